#!/usr/bin/env bash
# RoboTwin's handover_block on its own task class, with the stand-in robot: a student from the traces of ten scenes, distilled
# on-policy from a teacher of 680, against GRPO with as many decisions. Every command behind the results; four hours a seed on two
# cores, half an hour of it for demonstrations that all seeds share.
# The traces of the published runs lie in benchmarks/data. RECORD=1 records new ones instead, in half an hour.
# Run it from the root of the repository, after ./quickstart --robotwin or ./test has made .venv; or step by step:
#   SEEDS=1 benchmarks/robotwin_handover.sh teacher student opd
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
RUNS="${RUNS:-runs/robotwin_handover}"
SEEDS="${SEEDS:-0 1}"
# Also where RoboTwin's own assets have been downloaded
export ROBOTWIN_ASSETS_ROOT="$RUNS/stand-in"
ENV=RoboTwinHandoverBlock-v0

# 1. Traces of RoboTwin's own expert in 680 training scenes, each replayed with pushes to recover from.
demos() {
    opd-gym robotwin assets --stand-in -o "$ROBOTWIN_ASSETS_ROOT"
    if [ -n "${RECORD:-}" ]; then
        opd-gym robotwin install --planner
        opd-gym robotwin record --env $ENV -n 680 -o "$RUNS/traces"
    else
        python -m zipfile -e benchmarks/data/robotwin_handover.zip "$RUNS/traces"
    fi
    opd-gym robotwin demos --traces "$RUNS/traces" --perturbation 0.3 --image-size 64 \
        --cameras head left_wrist right_wrist -o "$RUNS/demos"
}

# train SEED FOLDER ALGO ARGUMENTS...: with the zoo's settings for RoboTwin
train() {
    if [ -e "$RUNS/seed$1/$2/$3" ]; then
        echo "There is a run in $RUNS/seed$1/$2/$3 already: remove it, or set RUNS to another folder." >&2
        return 1
    fi
    opd-gym train --algo "$3" --env $ENV --seed "$1" -f "$RUNS/seed$1/$2" "${@:4}"
}
checkpoint() { printf '%s' "$RUNS/seed$1/$2/sft/${ENV}_1/policy"; }
each_seed() { local seed; for seed in $SEEDS; do "$1" "$seed"; done; }

# 2. Every seed has a teacher and a student of its own, and a student of 80 scenes, which succeeds often enough for GRPO to have
# something to learn from.
sft() { train "$1" "$2" sft --demonstrations "$RUNS/demos" --student none "${@:3}"; }
train_teacher() { sft "$1" teacher --n-timesteps 3200 --hyperparams validation_fraction:0.03; }
train_student() { sft "$1" student --n-timesteps 800 --hyperparams n_demos:10; }
train_student80() { sft "$1" student80 --n-timesteps 800 --hyperparams n_demos:80; }
teacher() { each_seed train_teacher; }
student() { each_seed train_student; }
student80() { each_seed train_student80; }

# 3. OPD and GRPO from the student, and GRPO from the other one.
train_opd() {
    train "$1" . opd --n-timesteps 6000 --student "$(checkpoint "$1" student)" --teacher "$(checkpoint "$1" teacher)"
}
train_grpo() { train "$1" . grpo --n-timesteps 6000 --student "$(checkpoint "$1" student)"; }
train_grpo80() { train "$1" grpo80 grpo --n-timesteps 6000 --student "$(checkpoint "$1" student80)"; }
opd() { each_seed train_opd; }
grpo() { each_seed train_grpo; }
grpo80() { each_seed train_grpo80; }

# 4. Greedy actions in the 100 scenes that are for evaluation; 450 actions, as in training, instead of RoboTwin's 800.
evaluate_all() {
    local name
    for name in student:student/sft student80:student80/sft teacher:teacher/sft opd:opd grpo:grpo grpo80:grpo80/grpo; do
        opd-gym eval --env $ENV --checkpoint "$RUNS/seed$1/${name#*:}/${ENV}_1/policy" --episodes 100 \
            --env-kwargs horizon:450 instructions:seen -o "$RUNS/eval/${name%%:*}_seed$1.json"
    done
}
evaluate() { each_seed evaluate_all; }

# 5. Tables and curves, from the files alone. To make the checkpoints those of the zoo:
#   opd-gym export --env $ENV --checkpoint "$(checkpoint 1 teacher)" --dtype float16 -o opd_gym/zoo/checkpoints/robotwin-handover-teacher
report() { python benchmarks/report.py robotwin_handover --runs "$RUNS"; }

if [ $# -eq 0 ]; then set -- demos teacher student student80 opd grpo grpo80 evaluate report; fi
for step in "$@"; do "$step"; done
