# What the experiments of this folder have in common: make resumes them step by step, a training from its last checkpoint.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_NUM_THREADS ?= 1
NAME := $(basename $(notdir $(firstword $(MAKEFILE_LIST))))
RUNS ?= runs/$(NAME)
OUT ?= benchmarks/results/$(NAME)
colon := :
comma := ,
space := $(subst ,, )
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all report

# $(call train,FOLDER,ALGORITHM,ENV,ARGUMENTS): start a run, or go on with it
define train
	if [ -e $(1)/$(2)/$(3)_1/args.yml ]; then opd-gym train --resume $(1)/$(2)/$(3)_1 --no-progress; \
	else opd-gym train --algo $(2) --env $(3) -f $(1) --no-progress $(4); fi
endef

# The suites by their short names
ENV_object = LiberoObject-v0
ENV_spatial = LiberoSpatial-v0
ENV_goal = LiberoGoal-v0
ENV_10 = Libero10-v0
# Of LIBERO-Long the five tasks that its teacher has learned (libero_suites_12000.mk says why these)
TASKS_10 = 0 1 3 6 7

# $(call task_ids,SUITE), $(call only,SUITE): the tasks of TASKS_SUITE, if it names some, as an option and as a hyperparameter
task_ids = $(if $(TASKS_$(1)),--task-ids $(TASKS_$(1)))
only = $(if $(TASKS_$(1)),env_kwargs.task_ids:[$(subst $(space),$(comma),$(TASKS_$(1)))])

# What the zoo had of GRPO for LIBERO before libero_grpo.mk's sweep
EIGHT_GROUPS = group_size:8 n_groups:8 trajectories_per_batch:32 n_epochs:4 learning_rate:1e-4 temperature:0.3

# The last rollout, seen once as it is
AS_IN_THE_PAPER = state_replay:false gradient_steps:auto augmentation:null

# $(call counted,FOLDER,N ...): what the demonstrations in it had cost, beside the results; the first N of each task as well
define counted
	python benchmarks/count_demonstrations.py $(RUNS)/$(1) -o $(OUT)/$(1).json
	for n in $(2); do python benchmarks/count_demonstrations.py $(RUNS)/$(1) -n $$n -o $(OUT)/$(1)_$$n.json; done
	touch $(RUNS)/$(1)/done
endef

# Held-out: greedy actions on initial states which nobody trained on; of a suite of LIBERO all 500 official ones
EPISODES ?= 500
%/evaluation.json: | %/policy/config.json
	opd-gym eval --env $(patsubst %_1,%,$(notdir $*)) --checkpoint $*/policy --episodes $(EPISODES) $(EVAL) --no-progress -o $@

# $(call reported,ARGUMENTS): tables and curves of what is there, and copies of what they are made from
define reported
	opd-gym report $(RUNS) -o $(RUNS)/report.html --markdown $(OUT)/results.md --pictures $(OUT) --keep $(OUT) $(1)
endef

# $(call run,VARIANT,ALGORITHM,ENV,SEED,HYPERPARAMETERS): a training of a study and its evaluation
define run
all: $(RUNS)/$(1)/seed$(4)/$(2)/$(3)_1/evaluation.json
$(RUNS)/$(1)/seed$(4)/$(2)/$(3)_1/policy/config.json:
$(call train,$(RUNS)/$(1)/seed$(4),$(2),$(3),--seed $(4) $(5))
endef
