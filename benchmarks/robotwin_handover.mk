# RoboTwin's handover_block on its own task class, with the stand-in robot: a student from the traces of ten scenes, distilled
# on-policy from a teacher of 680, against GRPO with as many decisions; four hours a seed on two cores, half an hour of it for
# demonstrations that all seeds share.
#
#   make -f benchmarks/robotwin_handover.mk SEEDS=1
#   make -f benchmarks/robotwin_handover.mk report
#
# The traces of the published runs lie in benchmarks/data. RECORD=1 records new ones instead, in half an hour.
#
# Run it from the root of the repository, after ./quickstart --robotwin or ./test has made .venv.

include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = RoboTwinHandoverBlock-v0
SEEDS ?= 0 1
RECORD ?=
# Also where RoboTwin's own assets have been downloaded
export ROBOTWIN_ASSETS_ROOT = $(RUNS)/stand-in

# 1. Traces of RoboTwin's own expert in 680 training scenes, each replayed with pushes to recover from
$(RUNS)/traces/done:
	opd-gym robotwin assets --stand-in -o $(ROBOTWIN_ASSETS_ROOT)
	$(if $(RECORD),opd-gym robotwin install --planner; opd-gym robotwin record --env $(ENV) -n 680 -o $(@D),\
	    python -m zipfile -e benchmarks/data/robotwin_handover.zip $(@D))
	touch $@
$(RUNS)/demos/done: | $(RUNS)/traces/done
	opd-gym robotwin demos --traces $(RUNS)/traces --perturbation 0.3 --image-size 64 --cameras head left_wrist right_wrist -o $(@D)
	touch $@

# $(call policy,VARIANT,ALGORITHM,SEED): its checkpoint
policy = $(RUNS)/$(1)/seed$(3)/$(2)/$(ENV)_1/policy

# $(call seeded,SEED)
# 2. Every seed has a teacher and a student of its own, and a student of 80 scenes, which succeeds often enough for GRPO to
# have something to learn from. 3. OPD and GRPO from the student, and GRPO from the other one
define seeded
$(foreach name,teacher student student80,$(call policy,$(name),sft,$(1))/config.json): | $(RUNS)/demos/done
$(call run,teacher,sft,$(ENV),$(1),--n-timesteps 3200 --student none --demonstrations $(RUNS)/demos --hyperparams validation_fraction$(colon)0.03)
$(call run,student,sft,$(ENV),$(1),--n-timesteps 800 --student none --demonstrations $(RUNS)/demos --hyperparams n_demos$(colon)10)
$(call run,student80,sft,$(ENV),$(1),--n-timesteps 800 --student none --demonstrations $(RUNS)/demos --hyperparams n_demos$(colon)80)
$(foreach name,opd grpo,$(call policy,$(name),$(name),$(1))/config.json): | $(call policy,student,sft,$(1))/config.json
$(call policy,opd,opd,$(1))/config.json: | $(call policy,teacher,sft,$(1))/config.json
$(call policy,grpo80,grpo,$(1))/config.json: | $(call policy,student80,sft,$(1))/config.json
$(call run,opd,opd,$(ENV),$(1),--n-timesteps 6000 --student $(call policy,student,sft,$(1)) --teacher $(call policy,teacher,sft,$(1)))
$(call run,grpo,grpo,$(ENV),$(1),--n-timesteps 6000 --student $(call policy,student,sft,$(1)))
$(call run,grpo80,grpo,$(ENV),$(1),--n-timesteps 6000 --student $(call policy,student80,sft,$(1)))
endef
$(foreach seed,$(SEEDS),$(eval $(call seeded,$(seed))))

# 4. Greedy actions in the 100 scenes that are for evaluation; 450 actions, as in training, instead of RoboTwin's 800
EPISODES = 100
EVAL = --env-kwargs horizon:450 instructions:seen

# 5. Tables and curves of what is there. To make the checkpoints those of the zoo:
#   opd-gym export --env $(ENV) --checkpoint $(call policy,teacher,sft,1) --dtype float16 -o opd_gym/zoo/checkpoints/robotwin-handover-teacher
report:
	$(call reported,--title "OPD on RoboTwin's handover_block" --reference teacher -l 'student/*=student' -l 'opd/*=OPD' \
	    -l 'grpo/*=GRPO' -l 'teacher/*=teacher' -l 'student80/*=student of 80 scenes' -l 'grpo80/*=GRPO from 80 scenes')
