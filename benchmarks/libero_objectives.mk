# Which parts of OPD matter on LIBERO-Object: the divergence, the estimator, the group size, the replay of states, the number
# of gradient steps, the learning rate, the temperature, how often and how precisely the teacher is asked. Student and teacher
# are the zoo's. Half the decisions of libero_suites.mk: after 4,000 of them OPD is near its teacher, and little is left to tell
# apart.
#
#   make -f benchmarks/libero_objectives.mk -j2                    60 runs of 2,000 decisions, by a rough count five hours on two cores
#   make -f benchmarks/libero_objectives.mk divergence SEEDS=0
#   make -f benchmarks/libero_objectives.mk paper
#   make -f benchmarks/libero_objectives.mk report
DECISIONS ?= 2000
EPISODES ?= 200
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
SEEDS ?= 0 1 2

# One thing at a time is changed of the zoo's setting: reverse KL, exact, groups of 1, replay, 40 gradient steps every 128
# decisions, a learning rate of lin_1e-3, temperature 0.05
STUDIES = zoo divergence estimator group_size state_replay gradient_steps learning_rate temperature teacher
zoo = temperature:0.05
divergence = divergence:forward_kl divergence:jsd divergence:hard_ce
# The paper's letter: sampled tokens of the last rollout, seen once. At a temperature of 0.05 log-probabilities are twenty times
# farther apart, and so are gradients; hence once more with actions as the policy has them, and smaller steps. + is "and"
estimator = estimator:sampled estimator:sampled+temperature:1.0+learning_rate:1e-4
with_sampled = $(AS_IN_THE_PAPER)
group_size = group_size:2 group_size:4 group_size:8
state_replay = state_replay:false
with_false = gradient_steps:auto
gradient_steps = gradient_steps:10 gradient_steps:20 gradient_steps:80
learning_rate = learning_rate:lin_5e-4 learning_rate:lin_2e-3
temperature = temperature:0.3 temperature:1.0
# Of the seconds that it takes, time/teacher_seconds in progress.csv is the teacher's part
teacher = teacher_interval:2 teacher_interval:4 teacher_kwargs.dtype:bfloat16

# $(call study,NAME)
define study
.PHONY: $(1)
$(1): $(foreach seed,$(SEEDS),$(foreach change,$($(1)),$(RUNS)/$(subst $(colon),_,$(change))/seed$(seed)/opd/$(ENV)_1/evaluation.json))
endef
$(foreach name,$(STUDIES),$(eval $(call study,$(name))))
$(foreach seed,$(SEEDS),$(foreach name,$(STUDIES),$(foreach change,$($(name)),\
    $(eval $(call run,$(subst $(colon),_,$(change)),opd,$(ENV),$(seed),--n-timesteps $(DECISIONS) --hyperparams $(subst +, ,$(change)) \
        $(with_$(lastword $(subst $(colon), ,$(firstword $(subst +, ,$(change)))))))))))

# Twenty times as long, for as many gradient steps as the exact divergence has of 1,000 decisions
.PHONY: paper
paper: $(RUNS)/paper/seed0/opd/$(ENV)_1/evaluation.json
$(RUNS)/paper/seed0/opd/$(ENV)_1/policy/config.json:
	$(call train,$(RUNS)/paper/seed0,opd,$(ENV),--seed 0 --n-timesteps 40000 --hyperparams estimator:sampled temperature:1.0 learning_rate:1e-4 $(with_sampled))

LABELS = $(foreach n,2 4 8,-l 'group_size_$(n)/*=groups of $(n)') -l 'state_replay_false/*=without replay' \
    $(foreach n,10 20 80,-l 'gradient_steps_$(n)/*=$(n) gradient steps an iteration') \
    $(foreach n,2 4,-l 'teacher_interval_$(n)/*=teacher asked every $(n) decisions') -l 'teacher_kwargs.dtype_bfloat16/*=teacher in bfloat16'
report:
	$(call reported,--title "Objectives of OPD on LIBERO-Object" --reference "reverse KL" -l 'temperature_0.05/*=reverse KL' \
	    -l 'divergence_forward_kl/*=forward KL' -l 'divergence_jsd/*=JSD' -l 'divergence_hard_ce/*=hard CE' -l 'estimator_sampled/*=sampled' \
        -l 'estimator_sampled+*=sampled at temperature 1' -l 'paper/*=sampled at temperature 1 and twenty times as long' $(LABELS))
