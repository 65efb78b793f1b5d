# More rivals of OPD. On LIBERO-Object and -Goal PPO with as many decisions, at the zoo's temperature of 1 and at GRPO's of 0.3. GRPO
# that goes on from OPD's policies of LIBERO-Spatial and -Goal, where the teacher leaves most to gain, with as many decisions again.
# On Goal OPD to the paper's letter (sampled) and DAgger with hard labels (dagger: the teacher's most probable tokens in the
# student's states), which libero_objectives.mk has of Object; settings of GRPO are in libero_grpo.mk. The committed run of GRPO has
# the zoo's setting of that time, EIGHT_GROUPS in common.mk.
#
#   make -f benchmarks/libero_baselines.mk -j2     24 runs after those of libero_suites.mk, by a rough count four hours on two cores
#   make -f benchmarks/libero_baselines.mk dagger SEEDS=0
#   make -f benchmarks/libero_baselines.mk report
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

SEEDS ?= 0 1 2
OPD = runs/libero_suites
RIVALS = dagger sampled ppo ppo_0.3 opd_then_grpo
.PHONY: $(RIVALS)
all: $(RIVALS)

$(OPD)/%.json:
	$(MAKE) -f benchmarks/libero_suites.mk $@
# What they are measured by. $(call measure,SUITE,SEED)
define measure
$(RUNS)/opd/$(1)_seed$(2).json: | $(OPD)/$(1)/seed$(2)/opd/$(ENV_$(1))_1/evaluation.json
	mkdir -p $$(@D) && cp $$| $$@
endef
$(foreach seed,$(SEEDS),$(foreach suite,object spatial goal,$(eval $(call measure,$(suite),$(seed)))))

# $(call further,SUITE,ENV,SEED)
define further
opd_then_grpo: $(RUNS)/opd_then_grpo/seed$(3)/grpo/$(2)_1/evaluation.json $(RUNS)/opd/$(1)_seed$(3).json
$(call run,opd_then_grpo,grpo,$(2),$(3),--n-timesteps 4000 --student $(OPD)/$(1)/seed$(3)/opd/$(2)_1/policy)
$(RUNS)/opd_then_grpo/seed$(3)/grpo/$(2)_1/policy/config.json: | $(OPD)/$(1)/seed$(3)/opd/$(2)_1/policy/config.json
endef

# $(call rival,VARIANT,ALGORITHM,SUITE,SEED,HYPERPARAMETERS)
define rival
$(1): $(RUNS)/$(1)/seed$(4)/$(2)/$(ENV_$(3))_1/evaluation.json $(RUNS)/opd/$(3)_seed$(4).json
$(call run,$(1),$(2),$(ENV_$(3)),$(4),--n-timesteps 4000 --student libero-$(3)-student $(5))
endef

$(foreach seed,$(SEEDS),\
    $(eval $(call rival,dagger,opd,goal,$(seed),--hyperparams divergence:hard_ce))\
    $(eval $(call rival,sampled,opd,goal,$(seed),--hyperparams estimator:sampled temperature:1.0 learning_rate:1e-4 $(AS_IN_THE_PAPER)))\
    $(foreach suite,object goal,\
        $(eval $(call rival,ppo,ppo,$(suite),$(seed)))\
        $(eval $(call rival,ppo_0.3,ppo,$(suite),$(seed),--hyperparams temperature:0.3)))\
    $(eval $(call further,spatial,LiberoSpatial-v0,$(seed)))\
    $(eval $(call further,goal,LiberoGoal-v0,$(seed))))

report:
	$(call reported,--title "More rivals of OPD on LIBERO" --reference OPD -l 'opd/*=OPD' -l 'dagger/*=DAgger' -l 'sampled/*=sampled at temperature 1' \
	    -l 'ppo/*=PPO' -l 'ppo_0.3/*=PPO at temperature 0.3' -l 'opd_then_grpo/*=OPD then GRPO')
