# What GRPO can do from the student of LIBERO-Object: a sweep, and a long run of the best setting. The sweep has a training seed and
# sampled initial states that no comparison has; the long run is measured on the official ones.
#
#   make -f benchmarks/libero_grpo.mk -j2          the sweep, as many decisions as OPD makes; by a rough count an hour on two cores
#   make -f benchmarks/libero_grpo.mk long BEST="temperature:0.3 n_epochs:8"
#   make -f benchmarks/libero_grpo.mk report
DECISIONS ?= 4000
EPISODES ?= 200
EVAL = --init-states sampled --seed 700
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
SEEDS ?= 10

# + is "and"; the rest is the zoo's: 8 groups of 8, two minibatches of 32 trajectories. No temperature above 1, at which the student
# already succeeds in one episode of six; at 0.3 in one of four, and in half of them after some iterations
CHANGES = temperature:1.0+n_epochs:1 temperature:0.6+n_epochs:1 temperature:0.3+n_epochs:1 \
    temperature:0.3+n_epochs:4 temperature:0.3+n_epochs:4+learning_rate:3e-5 temperature:0.3+n_epochs:8 \
    temperature:0.3+n_epochs:4+learning_rate:3e-4 temperature:0.3+n_epochs:8+learning_rate:3e-4 temperature:0.3+n_epochs:4+n_groups:4+trajectories_per_batch:16 \
    $(foreach more,n_groups:4+trajectories_per_batch:8 n_groups:4+trajectories_per_batch:16+learning_rate:3e-4 n_groups:2+trajectories_per_batch:8,\
        temperature:0.3+n_epochs:4+$(more))
$(foreach seed,$(SEEDS),$(foreach change,$(CHANGES),\
    $(eval $(call run,$(subst $(colon),_,$(change)),grpo,$(ENV),$(seed),--n-timesteps $(DECISIONS) --hyperparams $(subst +, ,$(change))))))

all: $(RUNS)/student.json
$(RUNS)/student.json:
	opd-gym eval --env $(ENV) --checkpoint libero-object-student --episodes $(EPISODES) $(EVAL) --no-progress -o $@

# Ten times the decisions of OPD, with what the sweep says
BEST ?= temperature:0.3 n_epochs:4
.PHONY: long
$(RUNS)/long/%: EPISODES = 500
$(RUNS)/long/%: EVAL =
long: $(RUNS)/long/seed0/grpo/$(ENV)_1/evaluation.json
$(RUNS)/long/seed0/grpo/$(ENV)_1/policy/config.json:
	$(call train,$(RUNS)/long/seed0,grpo,$(ENV),--n-timesteps 40000 --hyperparams $(BEST))

# Whose success the long run is measured by
long: $(RUNS)/teacher.json
$(RUNS)/teacher.json: | runs/libero_suites/object/teacher.json
	cp $| $@
runs/libero_suites/%:
	$(MAKE) -f benchmarks/libero_suites.mk $@

LABELS = $(foreach change,$(CHANGES),-l '$(subst $(colon),_,$(change))/*=$(subst +, ,$(subst $(colon), ,$(change)))') \
    -l 'long/*=ten times the decisions' -l 'student.json=student' -l 'teacher.json=teacher'
.PHONY: against
against:
	opd-gym report $(RUNS) -o $(RUNS)/against_student.html --markdown $(OUT)/against_student.md --title "Against student" --reference student $(LABELS)
report:
	$(call reported,--title "GRPO on LIBERO-Object" $(LABELS) $(addprefix --reference ,$(if $(wildcard $(RUNS)/teacher.json),teacher)))
