# The zoo's teachers and students of LIBERO-Spatial, -Goal and -Long, in benchmarks/checkpoints. Those of LIBERO-Object:
# libero_object.sh.
#
#   make -f benchmarks/libero_checkpoints.mk spatial     one suite, by a rough count three hours on one core
#   make -f benchmarks/libero_checkpoints.mk -n          print the commands
#
# Run it from the root of the repository, after ./quickstart or ./test has made .venv. Stop it at any time: it goes on where
# it was, and a training goes on from its last checkpoint.

include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

SUITES ?= spatial goal 10
.PHONY: $(SUITES)
all: $(SUITES)

ENV_spatial = LiberoSpatial-v0
ENV_goal = LiberoGoal-v0
ENV_10 = Libero10-v0
# Tasks 5 and 9 of LIBERO-Long have no expert
TASKS_10 = 0 1 2 3 4 6 7 8
# Steps of SFT, on two demonstrations a task, for a student that has room to rise and successes to rise from
STUDENT_STEPS_spatial = 500
STUDENT_STEPS_goal = 500
STUDENT_STEPS_10 = 600

SFT = augmentation:random_shift_batch label_smoothing:2.0 policy_kwargs.optimizer_kwargs.weight_decay:1e-4 learning_rate:1e-3

# $(call suite,NAME,ENV)
define suite
$(1): benchmarks/checkpoints/libero-$(1)-teacher/config.json benchmarks/checkpoints/libero-$(1)-student/config.json \
    $(RUNS)/$(1)/teacher/longer/sft/$(2)_1/evaluation.json $(RUNS)/$(1)/student/sft/$(2)_1/evaluation.json

# 1. Demonstrations of the scripted expert on sampled initial states. The teacher's have pushes to recover from.
$(RUNS)/$(1)/demos/pushed/done:
	opd-gym demos --env $(2) $(call task_ids,$(1)) -n 40 --seed 50000 --image-size 64 --stride 2 --perturbation 0.03 -o $$(@D)
	touch $$@
$(RUNS)/$(1)/demos/plain/done:
	opd-gym demos --env $(2) $(call task_ids,$(1)) -n 8 --seed 90000 --image-size 64 -o $$(@D)
	touch $$@

# 2. The teacher: SFT, which goes on from its own weights. The student: two demonstrations a task.
$(RUNS)/$(1)/teacher/sft/$(2)_1/policy/config.json: | $(RUNS)/$(1)/demos/pushed/done
$(call train,$(RUNS)/$(1)/teacher,sft,$(2),--demonstrations $(RUNS)/$(1)/demos/pushed --student none --n-timesteps 2000 \
	    --hyperparams $(SFT) validation_fraction:0.05 $(call only,$(1)))
$(RUNS)/$(1)/teacher/longer/sft/$(2)_1/policy/config.json: | $(RUNS)/$(1)/teacher/sft/$(2)_1/policy/config.json
$(call train,$(RUNS)/$(1)/teacher/longer,sft,$(2),--demonstrations $(RUNS)/$(1)/demos/pushed \
	    --student $(RUNS)/$(1)/teacher/sft/$(2)_1/policy --n-timesteps 4000 --hyperparams $(SFT) validation_fraction:0.05 $(call only,$(1)))
$(RUNS)/$(1)/student/sft/$(2)_1/policy/config.json: | $(RUNS)/$(1)/demos/plain/done
$(call train,$(RUNS)/$(1)/student,sft,$(2),--demonstrations $(RUNS)/$(1)/demos/plain --student none --seed 2 \
	    --n-timesteps $(STUDENT_STEPS_$(1)) --hyperparams $(SFT) n_demos:2 $(call only,$(1)))

# 3. In half precision
benchmarks/checkpoints/libero-$(1)-teacher/config.json: | $(RUNS)/$(1)/teacher/longer/sft/$(2)_1/policy/config.json
	opd-gym export --env $(2) --checkpoint $(RUNS)/$(1)/teacher/longer/sft/$(2)_1/policy --dtype float16 -o $$(@D)
benchmarks/checkpoints/libero-$(1)-student/config.json: | $(RUNS)/$(1)/student/sft/$(2)_1/policy/config.json
	opd-gym export --env $(2) --checkpoint $(RUNS)/$(1)/student/sft/$(2)_1/policy --dtype float16 -o $$(@D)
endef
$(foreach name,$(SUITES),$(eval $(call suite,$(name),$(ENV_$(name)))))

report:
	$(call reported,--title "Teachers and students" -l '*student/*=student' -l '*teacher/longer/*=teacher' -l '*teacher/sft/*=teacher at first')
