# What GRPO can do from the student of LIBERO-Object: a sweep, and a long run of the best setting.
#
#   make -f benchmarks/libero_grpo.mk -j2          the sweep, 12,000 decisions each (by a rough count, two and a half hours on two cores)
#   make -f benchmarks/libero_grpo.mk long BEST="learning_rate:3e-5 temperature:1.0"
#   make -f benchmarks/libero_grpo.mk report
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
SEEDS ?= 0

# One thing at a time is changed of the zoo's setting: 8 groups of 8, two minibatches of 32 trajectories, 1e-4, temperature 1.
# No temperature above 1: there the student succeeds in one episode of six, at 0.3 in one of two
CHANGES = temperature:0.3 learning_rate:1e-4 learning_rate:3e-4 learning_rate:3e-5 temperature:0.6 n_groups:16 \
    trajectories_per_batch:64 n_epochs:2
$(foreach seed,$(SEEDS),$(foreach change,$(CHANGES),\
    $(eval $(call run,$(subst $(colon),_,$(change)),grpo,$(ENV),$(seed),--n-timesteps 12000 --hyperparams $(change)))))

# Ten times the decisions of OPD. The learning rate is what the sweep says
BEST ?= learning_rate:3e-5
.PHONY: long
long: $(RUNS)/long/seed0/grpo/$(ENV)_1/evaluation.json
$(RUNS)/long/seed0/grpo/$(ENV)_1/policy/config.json:
	$(call train,$(RUNS)/long/seed0,grpo,$(ENV),--n-timesteps 120000 --hyperparams $(BEST))

report:
	$(call reported,--title "GRPO on LIBERO-Object" -l 'long/*=ten times the decisions')
