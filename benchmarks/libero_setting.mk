# How OPD's setting for LIBERO in the zoo was chosen: one change after the other, each kept if it helped. On LIBERO-Object, with a
# training seed and with initial states that no comparison uses.
#
#   make -f benchmarks/libero_setting.mk            5 runs of 4,000 decisions, by a rough count an hour on one core
#   make -f benchmarks/libero_setting.mk report
EPISODES ?= 100
EVAL = --init-states sampled --seed 700
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
# 1 is what the zoo had until then, with the paper's groups of 8
SETTING_1 = group_size:8 temperature:1.0 learning_rate:lin_5e-4 n_steps:128
SETTING_2 = group_size:1 temperature:1.0 learning_rate:lin_5e-4 n_steps:128
SETTING_3 = group_size:1 temperature:0.3 learning_rate:lin_5e-4 n_steps:128
SETTING_4 = group_size:1 temperature:0.3 learning_rate:lin_1e-3 n_steps:128
SETTING_5 = group_size:1 temperature:0.3 learning_rate:lin_1e-3 n_steps:64

$(foreach i,1 2 3 4 5,$(eval $(call run,$(i),opd,$(ENV),10,--n-timesteps 4000 --hyperparams gradient_steps:40 $(SETTING_$(i)))))

report:
	$(call reported,--title "The zoo's setting of OPD on LIBERO" -l '1/*=1. groups of 8' -l '2/*=2. groups of 1' \
	    -l '3/*=3. temperature 0.3' -l '4/*=4. learning rate 1e-3' -l '5/*=5. twice the gradient steps')
