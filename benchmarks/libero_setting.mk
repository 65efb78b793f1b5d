# How OPD's setting for LIBERO in the zoo was chosen, on LIBERO-Object: one change after the other, each kept if it helped.
#
#   make -f benchmarks/libero_setting.mk            6 runs of 4,000 decisions, by a rough count an hour and a half on one core
#   make -f benchmarks/libero_setting.mk report
#
# The first four have training seed 0 and 200 official initial states, of which comparisons have all 500; the last two another
# seed, and sampled states, which no comparison has.
EPISODES ?= 200
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
# What the zoo had until then, with the paper's groups of 8
BEFORE = gradient_steps:40 n_steps:128 learning_rate:lin_5e-4 group_size:8 temperature:1.0
NEAR_GREEDY = gradient_steps:40 learning_rate:lin_1e-3 group_size:1 temperature:0.3
$(RUNS)/faster/% $(RUNS)/more_steps/%: EVAL = --init-states sampled --seed 700
$(RUNS)/faster/% $(RUNS)/more_steps/%: EPISODES = 100

$(eval $(call run,before,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(BEFORE)))
$(eval $(call run,near_greedy,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(filter-out temperature:%,$(BEFORE)) temperature:0.3))
$(eval $(call run,groups_of_1,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(filter-out group_size:%,$(BEFORE)) group_size:1))
$(eval $(call run,forward_kl,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(BEFORE) divergence:forward_kl))
$(eval $(call run,faster,opd,$(ENV),10,--n-timesteps 4000 --hyperparams $(NEAR_GREEDY) n_steps:128))
$(eval $(call run,more_steps,opd,$(ENV),10,--n-timesteps 4000 --hyperparams $(NEAR_GREEDY) n_steps:64))

report:
	$(call reported,--title "The zoo's setting of OPD on LIBERO" -l 'before/*=before' -l 'near_greedy/*=temperature 0.3' \
	    -l 'groups_of_1/*=groups of 1' -l 'forward_kl/*=forward KL' -l 'faster/*=both and learning rate 1e-3' \
	    -l 'more_steps/*=and twice the gradient steps')
