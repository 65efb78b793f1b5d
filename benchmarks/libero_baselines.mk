# Two more rivals of OPD: PPO with as many decisions on LIBERO-Object, and GRPO that goes on from OPD's policies of LIBERO-Spatial
# and -Goal, where the teacher leaves most to gain, with as many decisions again. OPD to the paper's letter (estimator) and DAgger
# with hard labels (divergence: hard_ce, the teacher's most probable tokens in the student's states) are in libero_objectives.mk,
# settings of GRPO in libero_grpo.mk. The committed run of GRPO has the zoo's setting of that time, EIGHT_GROUPS in common.mk.
#
#   make -f benchmarks/libero_baselines.mk -j2     9 runs after those of libero_suites.mk, by a rough count an hour and a half on two cores
#   make -f benchmarks/libero_baselines.mk ppo SEEDS=0
#   make -f benchmarks/libero_baselines.mk report
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

SEEDS ?= 0 1 2
OPD = runs/libero_suites
.PHONY: ppo opd_then_grpo
ppo: $(foreach seed,$(SEEDS),$(RUNS)/ppo/seed$(seed)/ppo/LiberoObject-v0_1/evaluation.json $(RUNS)/opd/object/seed$(seed)/opd/LiberoObject-v0_1.json)
all: ppo opd_then_grpo

$(OPD)/%.json:
	$(MAKE) -f benchmarks/libero_suites.mk $@
# What they are measured by
$(RUNS)/opd/%.json: | $(OPD)/%/evaluation.json
	mkdir -p $(@D) && cp $| $@

# $(call further,SUITE,ENV,SEED)
define further
opd_then_grpo: $(RUNS)/opd_then_grpo/seed$(3)/grpo/$(2)_1/evaluation.json $(RUNS)/opd/$(1)/seed$(3)/opd/$(2)_1.json
$(call run,opd_then_grpo,grpo,$(2),$(3),--n-timesteps 4000 --student $(OPD)/$(1)/seed$(3)/opd/$(2)_1/policy)
$(RUNS)/opd_then_grpo/seed$(3)/grpo/$(2)_1/policy/config.json: | $(OPD)/$(1)/seed$(3)/opd/$(2)_1/policy/config.json
endef

$(foreach seed,$(SEEDS),\
    $(eval $(call run,ppo,ppo,LiberoObject-v0,$(seed),--n-timesteps 4000))\
    $(eval $(call further,spatial,LiberoSpatial-v0,$(seed)))\
    $(eval $(call further,goal,LiberoGoal-v0,$(seed))))

report:
	$(call reported,--title "More rivals of OPD on LIBERO" --reference OPD -l 'opd/*=OPD' -l 'ppo/*=PPO' -l 'opd_then_grpo/*=OPD then GRPO')
