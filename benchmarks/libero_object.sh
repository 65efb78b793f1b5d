#!/usr/bin/env bash
# The student and the teacher of LIBERO-Object in opd_gym/zoo/checkpoints: every command that made them, and OPD and GRPO from
# them; about two hours on two cores. Of the same kind, with more seeds and suites: libero_suites.mk.
# Run it from the root of the repository, after ./quickstart or ./test has made .venv; or step by step:
#   benchmarks/libero_object.sh evaluate report
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
RUNS="${RUNS:-runs/libero_object}"
OUT=benchmarks/results/libero_object
ENV=LiberoObject-v0
SFT="learning_rate:1e-3 label_smoothing:2.0 augmentation:random_shift_batch policy_kwargs.optimizer_kwargs.weight_decay:1e-4"

# What the zoo's settings were then
OPD="learning_rate:lin_5e-4 n_steps:128 group_size:8 temperature:1.0"
GRPO="learning_rate:1e-4 temperature:1.0 n_epochs:1"

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
    # shellcheck disable=SC2086
    opd-gym train --algo opd --env $ENV --teacher expert --student "$RUNS/teacher/sft/${ENV}_1/policy" --n-timesteps 4000 \
        --hyperparams $OPD divergence:forward_kl teacher_kwargs.smoothing:2.0 -f "$RUNS/teacher"
    # 4,000 decisions were too few (95.4 % of the 500 official states): it went on from there
    opd-gym train --resume "$RUNS/teacher/opd/${ENV}_1" --n-timesteps 12000
    # shellcheck disable=SC2086
    opd-gym train --algo sft --env $ENV --demonstrations "$RUNS/demos/plain" --student none --n-timesteps 280 --seed 2 \
        --hyperparams $SFT n_demos:1 -f "$RUNS/student"
    # To make them the zoo's:
    #   opd-gym export --env $ENV --checkpoint "$RUNS/teacher/opd/${ENV}_1/policy" --dtype float16 -o opd_gym/zoo/checkpoints/libero-object-teacher
    #   opd-gym export --env $ENV --checkpoint "$RUNS/student/sft/${ENV}_1/policy" --dtype float16 -o opd_gym/zoo/checkpoints/libero-object-student
}

# 3. OPD and GRPO from that student, the same number of decisions. Held-out evaluation: greedy
# actions on all 500 of LIBERO's official initial states, which nobody trained on.
compare() {
    # shellcheck disable=SC2086
    opd-gym train --algo opd --env $ENV --seed 0 --n-timesteps 12000 --hyperparams $OPD --eval-episodes 500 -f "$RUNS/seed0"
    # shellcheck disable=SC2086
    opd-gym train --algo grpo --env $ENV --seed 0 --n-timesteps 12000 --hyperparams $GRPO --eval-episodes 500 -f "$RUNS/seed0"
}
evaluate() {
    opd-gym eval --env $ENV --checkpoint libero-object-student --episodes 500 -o "$RUNS/zoo/student.json"
    opd-gym eval --env $ENV --checkpoint libero-object-teacher --episodes 500 -o "$RUNS/zoo/teacher.json"
    opd-gym eval --env $ENV --checkpoint libero-object-teacher --episodes 500 -o "$RUNS/zoo/teacher_exact.json" \
        --env-kwargs visuals:exact
}

# 4. Tables and curves, from the files alone.
report() {
    opd-gym report "$RUNS" -o "$RUNS/report.html" --markdown "$OUT/results.md" --pictures "$OUT" --keep "$OUT" \
        --title "The zoo's checkpoints of LIBERO-Object" --reference teacher -l 'zoo/student.json=student' -l '*/grpo/*=GRPO' \
        -l '*/opd/*=OPD' -l 'zoo/teacher.json=teacher' -l "zoo/teacher_exact.json=the teacher on LIBERO's own pictures" \
        -l 'teacher/sft/*=teacher before DAgger' -l 'teacher/opd/*=teacher, not rounded' -l 'student/*=student, not rounded'
}

if [ $# -eq 0 ]; then set -- demos checkpoints compare evaluate report; fi
for step in "$@"; do "$step"; done
