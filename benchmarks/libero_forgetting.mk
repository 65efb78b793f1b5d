# What is forgotten: post-training on six tasks of LIBERO-Object, success on these and on the other four, and on LIBERO-PRO's
# perturbed tasks, before and after. Student and teacher are the zoo's; all have as many decisions as in libero_suites.mk.
#
#   make -f benchmarks/libero_forgetting.mk -j2    9 runs, by a rough count three hours on two cores
#   make -f benchmarks/libero_forgetting.mk eight_groups
#   make -f benchmarks/libero_forgetting.mk report
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
SEEDS ?= 0 1 2
TASKS_seen = 0 1 2 3 4 5
SFT = augmentation:random_shift_batch label_smoothing:2.0 policy_kwargs.optimizer_kwargs.weight_decay:1e-4 learning_rate:lin_1e-3
PERTURBED = LiberoObjectSwap-v0 LiberoObjectObject-v0 LiberoObjectLan-v0

# The offline control has as many labelled decisions, all of the six tasks
$(RUNS)/demos/done:
	opd-gym demos --env $(ENV) $(call task_ids,seen) -n 67 --seed 200000 --image-size 64 --stride 8 -o $(@D)
	$(call counted,demos)

$(foreach seed,$(SEEDS),$(foreach algo,opd grpo,$(eval $(call run,$(algo),$(algo),$(ENV),$(seed),--n-timesteps 4000 --hyperparams $(call only,seen)))))
$(foreach seed,$(SEEDS),$(eval $(call run,sft,sft,$(ENV),$(seed),--n-timesteps 1280 --demonstrations $(RUNS)/demos \
	    --student libero-object-student --hyperparams $(SFT))))
$(foreach seed,$(SEEDS),$(eval $(RUNS)/sft/seed$(seed)/sft/$(ENV)_1/policy/config.json: | $(RUNS)/demos/done))

# GRPO with what the zoo had before
.PHONY: eight_groups
eight_groups: $(RUNS)/grpo_eight_groups/seed0/grpo/$(ENV)_1/evaluation.json
$(RUNS)/grpo_eight_groups/seed0/grpo/$(ENV)_1/policy/config.json:
	$(call train,$(RUNS)/grpo_eight_groups/seed0,grpo,$(ENV),--n-timesteps 4000 --hyperparams $(EIGHT_GROUPS) $(call only,seen))

# Before and after, all ten tasks; and on LIBERO-PRO's, in files of their own
all: $(RUNS)/student.json $(RUNS)/perturbed/student.json
$(foreach seed,$(SEEDS),$(foreach algo,opd grpo sft,$(eval all: $(RUNS)/perturbed/$(algo)_seed$(seed).json)))
$(RUNS)/student.json: | runs/libero_suites/object/student.json
	cp $| $@
runs/libero_suites/%:
	$(MAKE) -f benchmarks/libero_suites.mk $@
$(RUNS)/perturbed/student.json:
	opd-gym eval --env $(PERTURBED) --checkpoint libero-object-student --episodes 100 --no-progress -o $@
define perturbed
$(RUNS)/perturbed/$(1)_seed$(2).json: | $(RUNS)/$(1)/seed$(2)/$(1)/$(ENV)_1/policy/config.json
	opd-gym eval --env $(PERTURBED) --checkpoint $(RUNS)/$(1)/seed$(2)/$(1)/$(ENV)_1/policy --episodes 100 --no-progress -o $$@
endef
$(foreach seed,$(SEEDS),$(foreach algo,opd grpo sft,$(eval $(call perturbed,$(algo),$(seed)))))

LABELS = --tasks 'trained on=0-5' --tasks 'not trained on=6-9' -l 'student.json=student' -l 'sft/*=SFT' -l 'grpo/*=GRPO' -l 'grpo_eight_groups/*=GRPO with eight groups' -l 'opd/*=OPD' \
    -l 'perturbed/student*=student' -l 'perturbed/sft*=SFT' -l 'perturbed/grpo*=GRPO' -l 'perturbed/opd*=OPD'
report:
	$(call reported,--title "Forgetting on LIBERO-Object" --reference student $(LABELS))

# The same with tests against SFT
.PHONY: against
against:
	opd-gym report $(RUNS) -o $(RUNS)/against_SFT.html --markdown $(OUT)/against_SFT.md --title "Against SFT" --reference SFT $(LABELS)
