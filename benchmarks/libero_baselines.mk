# Two more rivals of OPD on LIBERO-Object, with as many decisions: PPO, and GRPO that begins where a third of OPD's decisions
# have led. Student and teacher are the zoo's. OPD to the paper's letter (estimator) and DAgger with hard labels (divergence:
# hard_ce, the teacher's most probable tokens in the student's states) are in libero_objectives.mk, GRPO in libero_grpo.mk.
#
#   make -f benchmarks/libero_baselines.mk -j2     6 runs, by a rough count two and a half hours on two cores
#   make -f benchmarks/libero_baselines.mk ppo SEEDS=0
#   make -f benchmarks/libero_baselines.mk report
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
SEEDS ?= 0 1 2
.PHONY: ppo opd_then_grpo
ppo: $(foreach seed,$(SEEDS),$(RUNS)/ppo/seed$(seed)/ppo/$(ENV)_1/evaluation.json)
opd_then_grpo: $(foreach seed,$(SEEDS),$(RUNS)/opd_then_grpo/seed$(seed)/grpo/$(ENV)_1/evaluation.json)

# OPD's 4,000 decisions are the run of libero_objectives.mk with the zoo's setting, and GRPO makes 8,000
OBJECTIVES = runs/libero_objectives/temperature_1.0
FIRST = $(OBJECTIVES)/seed$(seed)/opd/$(ENV)_1/policy
$(OBJECTIVES)/%/policy/config.json:
	$(MAKE) -f benchmarks/libero_objectives.mk $@

$(foreach seed,$(SEEDS),\
    $(eval $(call run,ppo,ppo,$(ENV),$(seed),--n-timesteps 12000))\
    $(eval $(call run,opd_then_grpo,grpo,$(ENV),$(seed),--n-timesteps 8000 --student $(FIRST)))\
    $(eval $(RUNS)/opd_then_grpo/seed$(seed)/grpo/$(ENV)_1/policy/config.json: | $(FIRST)/config.json))

report:
	$(call reported,--title "PPO, and GRPO after OPD, on LIBERO-Object" -l 'ppo/*=PPO' -l 'opd_then_grpo/*=OPD then GRPO')
