#!/usr/bin/env bash
# The main job: a student from one demonstration a task, distilled on-policy from a teacher, against GRPO with the same
# budget of env steps, on the ten tasks of LIBERO-Object. Every command behind the results; about 75 minutes on two cores.
# Run it from the root of the repository, after ./quickstart or ./test has made .venv. SEEDS="0" is a third of it.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
RUNS="${RUNS:-runs/libero_object}"
SEEDS="${SEEDS:-0 1 2}"
ENV=LiberoObject-v0
SFT="learning_rate:1e-3 label_smoothing:2.0 augmentation:random_shift_batch policy_kwargs.optimizer_kwargs.weight_decay:1e-4"

# 1. Demonstrations of the scripted expert, on sampled initial states: 40 a task with pushes to recover from, and plain ones.
demos() {
    local half
    for half in "0 1 2 3 4" "5 6 7 8 9"; do
        # shellcheck disable=SC2086
        {
            opd-gym demos --env $ENV --task-ids $half -n 40 --seed 50000 --image-size 64 --stride 2 --perturbation 0.03 \
                -o "$RUNS/demos/pushed"
            opd-gym demos --env $ENV --task-ids $half -n 8 --seed 90000 --image-size 64 -o "$RUNS/demos/plain"
        } &
    done
    wait
}

# 2. The teacher and the student, the checkpoints of opd_gym/zoo/checkpoints (stored there in half precision). After its
#    demonstrations the teacher is corrected by the expert in the states that it visits itself (DAgger).
checkpoints() {
    # shellcheck disable=SC2086
    opd-gym train --algo sft --env $ENV --demonstrations "$RUNS/demos/pushed" --student none --n-timesteps 2000 \
        --hyperparams $SFT validation_fraction:0.05 -f "$RUNS/teacher"
    opd-gym train --algo opd --env $ENV --teacher expert --student "$RUNS/teacher/sft/${ENV}_1/policy" --n-timesteps 4000 \
        --hyperparams divergence:forward_kl teacher_kwargs.smoothing:2.0 -f "$RUNS/teacher"
    # 4,000 decisions were too few (95.4 % of the 500 official states): it went on from there
    opd-gym train --resume "$RUNS/teacher/opd/${ENV}_1" --n-timesteps 12000
    # shellcheck disable=SC2086
    opd-gym train --algo sft --env $ENV --demonstrations "$RUNS/demos/plain" --student none --n-timesteps 280 --seed 2 \
        --hyperparams $SFT n_demos:1 -f "$RUNS/student"
    # To make them the zoo's:
    #   opd-gym export --env $ENV --checkpoint "$RUNS/teacher/opd/${ENV}_1/policy" --dtype float16 -o opd_gym/zoo/checkpoints/libero-object-teacher
    #   opd-gym export --env $ENV --checkpoint "$RUNS/student/sft/${ENV}_1/policy" --dtype float16 -o opd_gym/zoo/checkpoints/libero-object-student
}

# 3. OPD and GRPO from that student (the zoo's defaults for this env), the same number of decisions.
compare() {
    local seed
    for seed in $SEEDS; do
        opd-gym train --algo opd --env $ENV --seed "$seed" --n-timesteps 12000 -f "$RUNS/seed$seed"
        opd-gym train --algo grpo --env $ENV --seed "$seed" --n-timesteps 12000 -f "$RUNS/seed$seed"
    done
}

# 4. Held-out evaluation: greedy actions on all 500 of LIBERO's official initial states, which nobody trained on.
evaluate() {
    local seed
    evaluate_one libero-object-student student
    evaluate_one libero-object-teacher teacher
    evaluate_one libero-object-teacher teacher_exact --env-kwargs visuals:exact
    for seed in $SEEDS; do
        evaluate_one "$RUNS/seed$seed/opd/${ENV}_1/policy" "opd_seed$seed"
        evaluate_one "$RUNS/seed$seed/grpo/${ENV}_1/policy" "grpo_seed$seed"
    done
}

evaluate_one() { opd-gym eval --env $ENV --checkpoint "$1" --episodes 500 -o "$RUNS/eval/$2.json" "${@:3}"; }

# 5. Tables and curves, from the files alone.
report() { python benchmarks/report.py libero_object --runs "$RUNS"; }

if [ $# -eq 0 ]; then set -- demos checkpoints compare evaluate report; fi
for step in "$@"; do "$step"; done
