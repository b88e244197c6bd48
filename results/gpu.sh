#!/usr/bin/env bash
# Try on a GPU what no test can show on a CPU: nine minutes on a large card, then read $OUT/page.md.
#
#     bash results/gpu.sh
#     PARTS="speed lamb" OUT=runs/gpu-2 bash results/gpu.sh     # some parts only
#     WHEELS=/path/to/wheels bash results/gpu.sh                # without network: SMAC and the like from a folder
#     DEVICE=cpu SLOW=2 bash results/gpu.sh                     # a rehearsal, everything tiny, twice the time limits
#
# It needs torch, torchvision, timm, scikit-learn, matplotlib, tqdm, scipy, psutil and pytest; the part `search` also needs
# smac, ConfigSpace, distributed and pebble. A part that fails or exceeds its time limit does not stop the others.

set -u
cd "$(dirname "$0")/.."
export DEVICE=${DEVICE:-cuda} OUT=${OUT:-runs/gpu-$(date +%Y%m%d-%H%M%S)} PYTHON=${PYTHON:-python}
if [ "$DEVICE" = cpu ]; then
    export MODELS=nexception_nano AMPS="off bf16" SPEED="${SPEED:---models nexception_nano,convnext_tiny@32 --batch 2 --repetitions 2}"
    export LAMB="--model nexception_nano --repetitions 2" SHARED=cpu EPOCHS=3
    export KERNELS="--models nexception_nano --batch 2 --repetitions 1"
    export DEPTHWISE="--shapes 16x7 --kernels 3,5 --batch 2 --repetitions 2"
else
    export MODELS="nexception_nano nexception_reduced nexception_tp" AMPS="off bf16 fp16" LAMB="" DEPTHWISE=""
    export KERNELS="--batch 64 --repetitions 5"
    export EPOCHS=6 SPEED="--models convnext_tiny,nexception_tp,nexception_t,xception,nexception_s,resnet50,swin_t --repetitions 15"
    # Two processes take a card each, if there are two; NCCL may refuse to share one.
    [ "$($PYTHON -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ] && export SHARED=cuda || export SHARED=cuda:0
fi
export TRAIN="train.py --data digits --seed 1 --epochs 2 --warmup-epochs 1" SEARCH="search.py --seed 1
    --min-epochs 1 --max-epochs 1 --trials 6 --time-limit 2m --device $DEVICE"
export PICTURES="
import pathlib, sys, PIL.Image
for i in range(320):
    path = pathlib.Path(sys.argv[1], ('val', 'train')[i >= 64], ('dark', 'bright')[i % 2], f'{i}.jpg')
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.effect_noise((128, 96), 32).point(lambda value: value // 2 + 120 * (i % 2)).convert('RGB').save(path)"
mkdir -p "$OUT"
: >"$OUT/parts.txt"
[ -n "${WHEELS:-}" ] && $PYTHON -m pip install --no-index --find-links "$WHEELS" -r requirements.txt >"$OUT/wheels.txt" 2>&1
nvidia-smi >"$OUT/machine.txt" 2>&1

part() { # NAME SECONDS COMMAND: run a part with its time limit; record its status and time
    case " ${PARTS:-$1} " in *" $1 "*) ;; *) return ;; esac
    local begun=$SECONDS
    timeout -k 5 $(($2 * ${SLOW:-1})) bash -uc "$3" >"$OUT/$1.txt" 2>&1
    echo "$1 $? $((SECONDS - begun))" | tee -a "$OUT/parts.txt"
}

stop_and_resume() { # FOLDER COMMAND...: run, send SIGTERM after the first epoch, run again
    local out=$1 && shift
    mkdir -p "$out"
    "$@" --out "$out" >"$out/stopped.txt" 2>&1 &
    until grep -q "^epoch 1/" "$out/stopped.txt"; do kill -0 $! && sleep 0.1 || break; done
    kill -TERM $!
    wait $!
    echo "status $? after SIGTERM: $(tail -1 "$out/stopped.txt")"
    "$@" --out "$out"
}
export -f stop_and_resume

part tests 60 '$PYTHON -m pytest -o addopts= --continue-on-collection-errors -m gpu'
part speed 50 '$PYTHON bench.py speed $SPEED --device $DEVICE --out "$OUT"'
part train-speed 50 '$PYTHON bench.py speed $SPEED --device $DEVICE --out "$OUT" --train'
part losses 70 '
    for model in $MODELS; do # the runs of a model side by side
        $PYTHON $TRAIN --model $model --device cpu --amp off --out "$OUT/losses/$model-cpu" &
        for amp in $AMPS; do
            $PYTHON $TRAIN --model $model --device $DEVICE --amp $amp --out "$OUT/losses/$model-$amp" &
        done
        wait
    done'
part lamb 20 '$PYTHON -m results.lamb $LAMB --device $DEVICE --out "$OUT"'
part depthwise 20 '$PYTHON -m results.depthwise $DEPTHWISE --device $DEVICE --out "$OUT"'
part kernels 20 '$PYTHON -m results.kernels $KERNELS --device $DEVICE --out "$OUT"'
part resume 30 '
    $PYTHON $TRAIN --epochs $EPOCHS --device $DEVICE --out "$OUT/resume/whole" && stop_and_resume \
        "$OUT/resume/stopped" $PYTHON $TRAIN --epochs $EPOCHS --device $DEVICE'
part folder 30 '
    $PYTHON -c "$PICTURES" "$OUT/pictures"
    $PYTHON train.py --data "$OUT/pictures" --model nexception_nano --size 32 --epochs 2 --batch 32 --device $DEVICE --out "$OUT/folder"'
part two 40 '
    $PYTHON $TRAIN --epochs $EPOCHS --accumulate 2 --device $DEVICE --out "$OUT/two/one" && stop_and_resume \
        "$OUT/two/both" $PYTHON -m torch.distributed.run --nproc_per_node=2 $TRAIN --epochs $EPOCHS --device $SHARED'
part search 60 '
    for count in 1 4; do $PYTHON $SEARCH --workers-per-gpu $count --out "$OUT/search-$count"; done'
part compiled-speed 90 '$PYTHON bench.py speed $SPEED --device $DEVICE --out "$OUT" --compile'
$PYTHON -m results.gpu_page "$OUT"
