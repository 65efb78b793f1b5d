#!/usr/bin/env bash
# RoboTwin's handover_block on its own task class, with the stand-in robot: a student from the traces of ten scenes, distilled
# on-policy from a teacher of 680, against GRPO with as many decisions. Every command behind the results; three to four hours
# on two cores.
# The traces of the published run lie in benchmarks/data. RECORD=1 records new ones instead, in half an hour.
# Run it from the root of the repository, after ./quickstart --robotwin or ./test has made .venv.
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
RUNS="${RUNS:-runs/robotwin_handover}"
SEEDS="${SEEDS:-0 1}"
GRPO_SEEDS="${GRPO_SEEDS:-0}"
ENV=RoboTwinHandoverBlock-v0

# 1. Traces of RoboTwin's own expert in 680 training scenes, each replayed with pushes to recover from.
demos() {
    opd-gym robotwin assets --stand-in
    if [ -n "${RECORD:-}" ]; then
        opd-gym robotwin install --planner
        opd-gym robotwin record --env $ENV -n 680 -o "$RUNS/traces"
    else
        python -m zipfile -e benchmarks/data/robotwin_handover.zip "$RUNS/traces"
    fi
    opd-gym robotwin demos --traces "$RUNS/traces" --perturbation 0.3 --image-size 64 \
        --cameras head left_wrist right_wrist -o "$RUNS/demos"
}

# 2. With the zoo's settings for RoboTwin: the teacher, the student, and one of 80 scenes, which succeeds often enough for GRPO to have something to learn from.
checkpoints() {
    opd-gym train --algo sft --env $ENV --demonstrations "$RUNS/demos" --student none --n-timesteps 3200 \
        --hyperparams validation_fraction:0.03 -f "$RUNS/teacher"
    opd-gym train --algo sft --env $ENV --demonstrations "$RUNS/demos" --student none --n-timesteps 800 \
        --hyperparams n_demos:10 -f "$RUNS/student"
    opd-gym train --algo sft --env $ENV --demonstrations "$RUNS/demos" --student none --n-timesteps 800 \
        --hyperparams n_demos:80 -f "$RUNS/student80"
}

# 3. OPD and GRPO from that student, and GRPO from the other one.
compare() {
    local seed student="$RUNS/student/sft/${ENV}_1/policy" teacher="$RUNS/teacher/sft/${ENV}_1/policy"
    for seed in $SEEDS; do
        opd-gym train --algo opd --env $ENV --seed "$seed" --n-timesteps 6000 --student "$student" --teacher "$teacher" \
            -f "$RUNS/seed$seed"
    done
    for seed in $GRPO_SEEDS; do
        opd-gym train --algo grpo --env $ENV --seed "$seed" --n-timesteps 6000 --student "$student" -f "$RUNS/seed$seed"
        opd-gym train --algo grpo --env $ENV --seed "$seed" --n-timesteps 6000 \
            --student "$RUNS/student80/sft/${ENV}_1/policy" -f "$RUNS/student80/seed$seed"
    done
}

# 4. Greedy actions in the 100 scenes that are for evaluation; 450 actions, as in training, instead of RoboTwin's 800.
evaluate_one() {
    opd-gym eval --env $ENV --checkpoint "$1/${ENV}_1/policy" --episodes 100 --env-kwargs horizon:450 -o "$RUNS/eval/$2.json"
}
evaluate() {
    local seed name
    for name in student student80 teacher; do evaluate_one "$RUNS/$name/sft" $name; done
    for seed in $SEEDS; do evaluate_one "$RUNS/seed$seed/opd" "opd_seed$seed"; done
    for seed in $GRPO_SEEDS; do
        evaluate_one "$RUNS/seed$seed/grpo" "grpo_seed$seed"
        evaluate_one "$RUNS/student80/seed$seed/grpo" "grpo80_seed$seed"
    done
}

# 5. Tables and curves, from the files alone.
report() { python benchmarks/report.py robotwin_handover --runs "$RUNS"; }

if [ $# -eq 0 ]; then set -- demos checkpoints compare evaluate report; fi
for step in "$@"; do "$step"; done
