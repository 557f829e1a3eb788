r"""
The evidence on a model of 4.8M parameters, 6 layers for 4 at the same pace (two hours, two cores):

    O=out/larger; E=experiments
    python $E/standin.py $O/standin --n_layer=6 --n_embd=256
    python train.py config/demo_pretrain.py --init_from=$O/standin --out_dir=$O/pretrained \
        --max_iters=2000 --batch_size=24 --batch_tokens=3072 --warmup_iters=100 \
        --learning_rate=1.5e-3 --min_lr=1.5e-4 --eval_interval=500
    touch $O/pretrained/done
    make evidence EVIDENCE=$O MORE=$E/larger.py SEEDS="1 2 3" \
        VARIANTS="control control_fast shipped fast distil distil_1 distil_random fade_0 at_once"
"""
init_from = 'out/larger/pretrained'
learning_rate, min_lr = 0.6 * learning_rate, 0.6 * min_lr       # to 6e-4, as for GPT-2
gap_ln2, gap_ln1qk, gap_ln1v = (gap * 4 // 6 for gap in (gap_ln2, gap_ln1qk, gap_ln1v))
