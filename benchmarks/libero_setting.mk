# How OPD's setting for LIBERO in the zoo was chosen: one change after the other.
#
#   make -f benchmarks/libero_setting.mk            20 runs of 4,000 decisions, by a rough count six hours on one core
#   make -f benchmarks/libero_setting.mk report paired
#
# On LIBERO-Object, the first four with training seed 0 and 200 official initial states, of which comparisons have all 500; the next two
# with another seed, and sampled states, which no comparison has. Then that setting on three suites, and, as LIBERO-Goal stayed behind,
# nearer to the greedy actions there, on sampled states again. Last, shorter episodes in training on Spatial and Goal, on sampled
# states too, and what the zoo had before, on the official ones.
EPISODES ?= 200
include $(dir $(firstword $(MAKEFILE_LIST)))common.mk

ENV = LiberoObject-v0
# What the zoo had until then, with the paper's groups of 8
BEFORE = gradient_steps:40 n_steps:128 learning_rate:lin_5e-4 group_size:8 temperature:1.0
HORIZON_Object = env_kwargs.horizon:160
HORIZON_Spatial = env_kwargs.horizon:160
HORIZON_Goal = env_kwargs.horizon:300
GOAL_BY_TASK = env_kwargs.horizon:[112,112,112,300,112,112,112,112,112,112]
NEAR_GREEDY = gradient_steps:40 learning_rate:lin_1e-3 group_size:1 temperature:0.3
ZOO = gradient_steps:40 learning_rate:lin_1e-3 group_size:1 temperature:0.05 n_steps:64
SAMPLED = $(RUNS)/faster/% $(RUNS)/more_steps/% $(RUNS)/greedier/% $(RUNS)/suites/goal_% $(RUNS)/smaller_batches/% $(RUNS)/suites/spatial_%
$(SAMPLED): EVAL = --init-states sampled --seed 700
$(SAMPLED): EPISODES = 100
$(RUNS)/suites/seed0/%: EPISODES = 500
$(RUNS)/shorter/% $(RUNS)/greedy/% $(RUNS)/larger_rollouts/% $(RUNS)/steps_80/%: EVAL = --init-states sampled --seed 700
$(RUNS)/longer/% $(RUNS)/short_goal/%: EPISODES = 500

$(eval $(call run,before,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(BEFORE)))
$(eval $(call run,near_greedy,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(filter-out temperature:%,$(BEFORE)) temperature:0.3))
$(eval $(call run,groups_of_1,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(filter-out group_size:%,$(BEFORE)) group_size:1))
$(eval $(call run,forward_kl,opd,$(ENV),0,--n-timesteps 4000 --hyperparams $(BEFORE) divergence:forward_kl))
$(eval $(call run,faster,opd,$(ENV),10,--n-timesteps 4000 --hyperparams $(NEAR_GREEDY) n_steps:128))
$(eval $(call run,more_steps,opd,$(ENV),10,--n-timesteps 4000 --hyperparams $(NEAR_GREEDY) n_steps:64))
$(foreach suite,Object Spatial Goal,\
    $(eval $(call run,suites,opd,Libero$(suite)-v0,0,--n-timesteps 4000 --hyperparams $(NEAR_GREEDY) n_steps:64 $(HORIZON_$(suite)))))
$(eval $(call run,greedier,opd,LiberoGoal-v0,10,--n-timesteps 4000 --hyperparams $(ZOO) $(HORIZON_Goal)))
# On LIBERO-Spatial, twice the gradient steps on half as many states each, which costs the same; beside what the zoo had
$(eval $(call run,smaller_batches,opd,LiberoSpatial-v0,10,--n-timesteps 4000 --hyperparams $(filter-out gradient_steps:%,$(ZOO)) gradient_steps:80 batch_size:64 $(HORIZON_Spatial)))
all: $(RUNS)/suites/spatial_sampled_states.json
$(RUNS)/suites/spatial_sampled_states.json: | $(RUNS)/longer/seed0/opd/LiberoSpatial-v0_1/policy/config.json
	opd-gym eval --env LiberoSpatial-v0 --checkpoint $(RUNS)/longer/seed0/opd/LiberoSpatial-v0_1/policy --episodes $(EPISODES) $(EVAL) --no-progress -o $@
all: $(RUNS)/suites/goal_sampled_states.json
$(RUNS)/suites/goal_sampled_states.json: | $(RUNS)/suites/seed0/opd/LiberoGoal-v0_1/policy/config.json
	opd-gym eval --env LiberoGoal-v0 --checkpoint $(RUNS)/suites/seed0/opd/LiberoGoal-v0_1/policy --episodes $(EPISODES) $(EVAL) --no-progress -o $@
# Episodes in training of 112 steps; on the official states what the zoo had before, and GRPO likewise, and on Goal shorter episodes
# but for the task in which a solved one takes 220 steps
$(foreach suite,Spatial Goal,\
    $(eval $(call run,shorter,opd,Libero$(suite)-v0,10,--n-timesteps 4000 --hyperparams $(ZOO) env_kwargs.horizon:112))\
    $(eval $(call run,longer,opd,Libero$(suite)-v0,0,--n-timesteps 4000 --hyperparams $(ZOO) $(HORIZON_$(suite))))\
    $(eval $(call run,longer,grpo,Libero$(suite)-v0,0,--n-timesteps 4000 --hyperparams $(EIGHT_GROUPS) $(HORIZON_$(suite)))))
# All but greedy: what is practised is then what is measured, also where greedy actions get stuck
$(eval $(call run,greedy,opd,LiberoGoal-v0,10,--n-timesteps 4000 --hyperparams $(filter-out temperature:%,$(ZOO)) temperature:0.001 env_kwargs.horizon:112))
# Four times as many decisions an iteration, with as many gradient steps a decision: the first updates see more than the states of ten episodes
$(foreach suite,Spatial Goal,\
    $(eval $(call run,larger_rollouts,opd,Libero$(suite)-v0,10,--n-timesteps 4000 --hyperparams $(filter-out n_steps:% gradient_steps:%,$(ZOO)) n_steps:256 gradient_steps:160 env_kwargs.horizon:112)))
# Twice the gradient steps, the one change in libero_objectives.mk that did better than the zoo's setting, in one run
$(foreach suite,Spatial Goal,\
    $(eval $(call run,steps_80,opd,Libero$(suite)-v0,10,--n-timesteps 4000 --hyperparams $(filter-out gradient_steps:%,$(ZOO)) gradient_steps:80 env_kwargs.horizon:112)))
$(foreach seed,0 1,$(eval $(call run,short_goal,opd,LiberoGoal-v0,$(seed),--n-timesteps 4000 --hyperparams $(ZOO) $(GOAL_BY_TASK))))
all: $(RUNS)/shorter/goal_official_states.json $(RUNS)/short_goal/goal_sampled_states.json
$(RUNS)/shorter/goal_official_states.json: | $(RUNS)/shorter/seed10/opd/LiberoGoal-v0_1/policy/config.json
	opd-gym eval --env LiberoGoal-v0 --checkpoint $(RUNS)/shorter/seed10/opd/LiberoGoal-v0_1/policy --episodes 500 --no-progress -o $@
$(RUNS)/short_goal/goal_sampled_states.json: | $(RUNS)/short_goal/seed0/opd/LiberoGoal-v0_1/policy/config.json
	opd-gym eval --env LiberoGoal-v0 --checkpoint $(RUNS)/short_goal/seed0/opd/LiberoGoal-v0_1/policy --episodes 200 --init-states sampled --seed 700 \
	    --no-progress -o $@

report:
	$(call reported,--title "The zoo's setting of OPD on LIBERO" -l 'before/*=before' -l 'near_greedy/*=temperature 0.3' \
	    -l 'groups_of_1/*=groups of 1' -l 'forward_kl/*=forward KL' -l 'faster/*=both and learning rate 1e-3' \
	    -l 'more_steps/*=and twice the gradient steps' -l 'suites/seed0/*=that on all suites' -l 'suites/goal*=that on sampled states' \
	    -l 'greedier/*=temperature 0.05 on sampled states' -l 'suites/spatial_*=temperature 0.05 on sampled states' \
	    -l 'smaller_batches/*=smaller batches on sampled states' -l 'shorter/*.json=episodes of 112 steps on official states' \
	    -l 'shorter/*=episodes of 112 steps on sampled states' \
	    -l 'larger_rollouts/*=episodes of 112 steps and 512 decisions an iteration on sampled states' \
    -l 'steps_80/*=episodes of 112 steps and twice the gradient steps on sampled states' -l 'greedy/*=temperature 0.001 and episodes of 112 steps on sampled states' -l 'longer/*/opd/*=before the shorter episodes' -l 'longer/*/grpo/*=GRPO before the shorter episodes' \
	    -l 'short_goal/*.json=112 steps in nine tasks and 300 in one on sampled states' \
	    -l 'short_goal/*=112 steps in nine tasks and 300 in one')

# The same episodes after and before; of sampled states those that both have
PAIRED = import sys; from opd_gym.evaluation import EvaluationResult as Result; \
    pairs = [(a, b, Result.load(a), Result.load(b)) for a, b in zip(sys.argv[1::2], sys.argv[2::2])]; \
    shared = [(a, b, Result([e for e in x.episodes if e.key in {f.key for f in y.episodes}], versions=x.versions), y) for a, b, x, y in pairs]; \
    print('| after | before | states | gained | lost | McNemar\'s p |\n|---|---|---|---|---|---|'); \
    [print('| {} | {} | {} | {} | {} | {:.2g} |'.format(a, b, len(y.episodes), *x.paired(y))) for a, b, x, y in shared]
SUITES_RUNS = runs/libero_suites
GRPO_RUNS = runs/libero_grpo
# $(call pairs,SUITE,ENV): OPD and GRPO now and before, GRPO before and its student
pairs = $(SUITES_RUNS)/$(1)/seed0/opd/$(2)_1/evaluation.json $(RUNS)/longer/seed0/opd/$(2)_1/evaluation.json \
    $(GRPO_RUNS)/eight_groups/seed0/grpo/$(2)_1/evaluation.json $(RUNS)/longer/seed0/grpo/$(2)_1/evaluation.json \
    $(RUNS)/longer/seed0/grpo/$(2)_1/evaluation.json $(SUITES_RUNS)/$(1)/student.json
PAIRS = $(RUNS)/shorter/seed10/opd/LiberoSpatial-v0_1/evaluation.json $(RUNS)/suites/spatial_sampled_states.json \
    $(RUNS)/shorter/seed10/opd/LiberoGoal-v0_1/evaluation.json $(RUNS)/greedier/seed10/opd/LiberoGoal-v0_1/evaluation.json \
    $(foreach change,larger_rollouts steps_80,$(foreach env,LiberoSpatial-v0 LiberoGoal-v0,$(RUNS)/$(change)/seed10/opd/$(env)_1/evaluation.json $(RUNS)/shorter/seed10/opd/$(env)_1/evaluation.json)) \
    $(RUNS)/greedy/seed10/opd/LiberoGoal-v0_1/evaluation.json $(RUNS)/shorter/seed10/opd/LiberoGoal-v0_1/evaluation.json \
    $(call pairs,spatial,LiberoSpatial-v0) $(call pairs,goal,LiberoGoal-v0)
$(SUITES_RUNS)/%:
	$(MAKE) -f benchmarks/libero_suites.mk $@
$(GRPO_RUNS)/%:
	$(MAKE) -f benchmarks/libero_grpo.mk $@
.PHONY: paired
paired: | $(PAIRS)
	python -c "$(PAIRED)" $(PAIRS) > $(OUT)/paired.md
