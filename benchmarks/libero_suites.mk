# OPD against GRPO, SFT and its teacher on the suites of LIBERO. All begin with the zoo's student; libero_object.sh and
# libero_suites_12000.mk made it and its teacher.
#
#   make -f benchmarks/libero_suites.mk                      everything, one thing after another; by a rough count twenty hours on two cores
#   make -f benchmarks/libero_suites.mk -j2 object SEEDS=0 FURTHER=   one suite, one seed, two things at once
#   make -f benchmarks/libero_suites.mk -n spatial           print the commands
#
# Run it from the root of the repository, after ./quickstart or ./test has made .venv. Stop it at any time: it goes on where
# it was, and a training goes on from its last checkpoint.

include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

SUITES ?= object spatial goal 10
SEEDS ?= 0 1 2
DECISIONS ?= 4000
.PHONY: $(SUITES) against
all: $(SUITES)

$(RUNS)/10/%.json: EVAL = --task-ids $(TASKS_10)
$(RUNS)/10/%.json: EPISODES = 250
# Demonstrations a task of the offline controls, of the scripted expert and of OPD's own teacher (its successes): about as many
# labelled decisions as OPD's teacher labels. The episodes in which the teacher failed come on top (demos_of_teacher.json)
CONTROL_DEMOS_object = 40
CONTROL_DEMOS_spatial = 50
CONTROL_DEMOS_goal = 55
CONTROL_DEMOS_10 = 52
# Of the teacher's, so many that they and its failures between them took as many env steps as OPD's 4,000 decisions
STEPS_DEMOS_goal = 20

# Of the teacher's, with which half of SFT comes before OPD
half = $(shell expr $(CONTROL_DEMOS_$(1)) / 2)

SFT = augmentation:random_shift_batch label_smoothing:2.0 policy_kwargs.optimizer_kwargs.weight_decay:1e-4 learning_rate:lin_1e-3

# $(call suite,NAME,ENV)
define suite
$(1): $(foreach role,student teacher,$(RUNS)/$(1)/$(role).json) \
    $(foreach seed,$(SEEDS),$(foreach algo,opd grpo sft of_teacher/sft $(if $(STEPS_DEMOS_$(1)),as_many_steps/sft) warm_start/sft warm_start/opd,$(RUNS)/$(1)/seed$(seed)/$(algo)/$(2)_1/evaluation.json))
$(RUNS)/$(1)/student.json $(RUNS)/$(1)/teacher.json: $(RUNS)/$(1)/%.json:
	opd-gym eval --env $(2) --checkpoint libero-$(1)-$$* --episodes $$(EPISODES) $$(EVAL) --no-progress -o $$@
$(RUNS)/$(1)/demos/done:
	opd-gym demos --env $(2) $(call task_ids,$(1)) -n $(CONTROL_DEMOS_$(1)) --seed 200000 --image-size 64 --stride 8 -o $$(@D)
	$$(call counted,$(1)/demos)
$(RUNS)/$(1)/demos_of_teacher/done:
	opd-gym demos --env $(2) $(call task_ids,$(1)) -n $(CONTROL_DEMOS_$(1)) --seed 200000 --stride 8 --checkpoint libero-$(1)-teacher -o $$(@D)
	$$(call counted,$(1)/demos_of_teacher,$(STEPS_DEMOS_$(1)) $(call half,$(1)))
$(foreach seed,$(SEEDS),$(eval $(call runs,$(1),$(2),$(seed))))
endef

# $(call runs,NAME,ENV,SEED): OPD; GRPO with as many decisions; SFT on as many labelled decisions with as many gradient steps, of the
# scripted expert and of the teacher, and of the teacher with as many env steps; and OPD after SFT on the teacher, half the decisions and
# gradient steps of each
define runs
$(RUNS)/$(1)/seed$(3)/opd/$(2)_1/policy/config.json:
$(call train,$(RUNS)/$(1)/seed$(3),opd,$(2),--seed $(3) --n-timesteps $(DECISIONS) --teacher libero-$(1)-teacher \
	    --student libero-$(1)-student $(addprefix --hyperparams ,$(call only,$(1))))
$(RUNS)/$(1)/seed$(3)/grpo/$(2)_1/policy/config.json:
$(call train,$(RUNS)/$(1)/seed$(3),grpo,$(2),--seed $(3) --n-timesteps $(DECISIONS) --student libero-$(1)-student \
	    $(addprefix --hyperparams ,$(call only,$(1))))
$(RUNS)/$(1)/seed$(3)/sft/$(2)_1/policy/config.json: | $(RUNS)/$(1)/demos/done
$(call train,$(RUNS)/$(1)/seed$(3),sft,$(2),--seed $(3) --n-timesteps 1280 --demonstrations $(RUNS)/$(1)/demos \
	    --student libero-$(1)-student --hyperparams $(SFT) $(call only,$(1)))
$(RUNS)/$(1)/seed$(3)/of_teacher/sft/$(2)_1/policy/config.json: | $(RUNS)/$(1)/demos_of_teacher/done
$(call train,$(RUNS)/$(1)/seed$(3)/of_teacher,sft,$(2),--seed $(3) --n-timesteps 1280 --demonstrations $(RUNS)/$(1)/demos_of_teacher \
	    --student libero-$(1)-student --hyperparams $(SFT) $(call only,$(1)))
$(RUNS)/$(1)/seed$(3)/as_many_steps/sft/$(2)_1/policy/config.json: | $(RUNS)/$(1)/demos_of_teacher/done
$(call train,$(RUNS)/$(1)/seed$(3)/as_many_steps,sft,$(2),--seed $(3) --n-timesteps 1280 --demonstrations $(RUNS)/$(1)/demos_of_teacher \
	    --student libero-$(1)-student --hyperparams n_demos:$(STEPS_DEMOS_$(1)) $(SFT) $(call only,$(1)))
$(RUNS)/$(1)/seed$(3)/warm_start/sft/$(2)_1/policy/config.json: | $(RUNS)/$(1)/demos_of_teacher/done
$(call train,$(RUNS)/$(1)/seed$(3)/warm_start,sft,$(2),--seed $(3) --n-timesteps 640 --demonstrations $(RUNS)/$(1)/demos_of_teacher \
	    --student libero-$(1)-student --hyperparams n_demos:$(call half,$(1)) $(SFT) $(call only,$(1)))
$(RUNS)/$(1)/seed$(3)/warm_start/opd/$(2)_1/policy/config.json: | $(RUNS)/$(1)/seed$(3)/warm_start/sft/$(2)_1/policy/config.json
$(call train,$(RUNS)/$(1)/seed$(3)/warm_start,opd,$(2),--seed $(3) --n-timesteps 2000 --teacher libero-$(1)-teacher \
	    --student $(RUNS)/$(1)/seed$(3)/warm_start/sft/$(2)_1/policy $(addprefix --hyperparams ,$(call only,$(1))))
endef

$(foreach name,$(SUITES),$(eval $(call suite,$(name),$(ENV_$(name)))))

# On LIBERO-Object five seeds of OPD and GRPO
FURTHER ?= $(filter-out $(SEEDS),3 4)
object: $(foreach seed,$(FURTHER),$(foreach algo,opd grpo,$(RUNS)/object/seed$(seed)/$(algo)/$(ENV_object)_1/evaluation.json))
$(foreach seed,$(FURTHER),$(eval $(call runs,object,$(ENV_object),$(seed))))

# LIBERO-Long's episodes are two to three times as long as the others', so 4,000 decisions are few of them: OPD with three times as many
10: $(foreach seed,$(SEEDS),$(RUNS)/10/seed$(seed)/longer/opd/$(ENV_10)_1/evaluation.json)
define longer
$(RUNS)/10/seed$(1)/longer/opd/$(ENV_10)_1/policy/config.json:
$(call train,$(RUNS)/10/seed$(1)/longer,opd,$(ENV_10),--seed $(1) --n-timesteps 12000 --teacher libero-10-teacher \
	    --student libero-10-student --hyperparams $(call only,10))
endef
$(foreach seed,$(SEEDS),$(eval $(call longer,$(seed))))

LABELS = -l '*student.json=student' -l '*/of_teacher/*=SFT on the teacher' -l '*/as_many_steps/*=SFT on the teacher with as many env steps' -l '*/warm_start/sft/*=half of SFT on the teacher' \
    -l '*/warm_start/opd/*=half of SFT on the teacher then OPD' -l '*/sft/*=SFT' -l '*/grpo/*=GRPO' -l '*/seed?/opd/*=OPD' \
    -l '*/longer/opd/*=OPD with three times the decisions' \
    -l '*teacher.json=teacher'

# Held-out evaluation: common.mk. Tables and curves. What OPD's teachers had cost, in env steps of the demonstrations (of Spatial,
# Goal and Long as counted by libero_suites_12000.mk, of Object about 33,000) and of DAgger (Object's), and in minutes: about 20 of recording,
# the rest training, on two cores beside other work. Half of SFT took 42,124 more of Goal (demos_of_teacher_27.json), and about 11
# minutes: 5 of training, the rest recording by the times of its files
report:
	$(call reported,--title "OPD on LIBERO" --reference teacher $(LABELS) $(foreach cost,\
	    LiberoObject-v0=128000$(comma)135 LiberoSpatial-v0=26424$(comma)153 LiberoGoal-v0=28302$(comma)100 Libero10-v0=55092$(comma)69,--before OPD@$(cost)) \
	    --before 'OPD with three times the decisions=55092$(comma)69' --before 'half of SFT on the teacher then OPD=70426$(comma)111')

# The same with tests against others than the teacher
against:
	for name in OPD student SFT "SFT on the teacher"; do file=against_$$(echo $$name | tr ' ' _); \
	    opd-gym report $(RUNS) -o $(RUNS)/$$file.html --markdown $(OUT)/$$file.md --title "Against $$name" --reference "$$name" $(LABELS); done
