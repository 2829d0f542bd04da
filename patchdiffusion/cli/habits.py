"""Flags of other programs, with the flags to use instead; none of them is accepted."""

from typing import NamedTuple


class Habit(NamedTuple):
    """Flags of other programs with the same meaning."""

    names: str
    """Names without dashes, separated by spaces."""
    meant: str
    """Replacement; applies to commands that have the first flag in it."""
    commands: str = ""
    """Commands to which it applies, separated by spaces; empty for all."""


HABITS = (
    # Length and size of training
    Habit(
        "epochs epoch num-epochs num-train-epochs max-epochs n-epochs",
        "--images: epochs times the size of the data set, such as --images 100k",
    ),
    Habit(
        "num-steps max-steps max-train-steps train-steps num-train-steps total-steps "
        "train-num-steps training-steps steps iterations iters max-iters num-iters niter "
        "total-iters kimg total-kimg nimg duration total-images",
        "--images, the length of the run, such as --images 100k (or steps, with --clock steps)",
    ),
    Habit(
        "batch-size batchsize bs b batch-total total-batch-size train-batch-size global-batch-size",
        "--batch, whole images per step over all processes",
    ),
    Habit(
        "batch-gpu gradient-checkpointing micro-batch-size per-device-train-batch-size "
        "gradient-accumulation-steps gradient-accumulation grad-accum accumulate "
        "accumulation-steps gradient-accumulate-every",
        "--micro-batch, whole images per process and forward pass",
    ),
    Habit("max-time time-limit hours", "--max-hours"),
    # Data
    Habit(
        "size resolution image-size img-size imgsz image-resolution res width height px",
        "--data.resolution, such as --data.resolution 64",
    ),
    Habit(
        "data data-dir data-path dataset dataset-name dataset-path dataset-dir train-data-dir "
        "train-dir image-dir image-folder images-dir instance-data-dir folder path input root",
        "no flag is needed: images come first, as in: patchdiffusion train ./photos (or "
        "--data.path ./photos)",
        "train bench doctor",
    ),
    Habit(
        "flip mirror xflip hflip random-flip horizontal-flip augment-horizontal-flip",
        "--data.flip",
    ),
    Habit("augment augmentation", "--data.augment.p"),
    Habit("center-crop random-crop", "--data.resolution; crops are the subject of --patches"),
    Habit(
        "workers num-workers nw dataloader-num-workers",
        "no flag is needed: images are decoded once into a pack that is mapped into memory (CPU "
        "threads: --threads)",
        "train bench doctor prepare",
    ),
    Habit(
        "num-classes class-cond cond class-conditional conditional",
        "--network.num-classes, or 0 to ignore classes",
    ),
    Habit("in-channels image-channels", "--data.channels"),
    # Optimizer
    Habit("lr learning-rate base-lr blr lr0 train-lr learningrate", "--optim.lr"),
    Habit("weight-decay wd adam-weight-decay", "--optim.weight-decay"),
    Habit("optimizer optim-type opt", "--optim"),
    Habit(
        "beta1 beta2 betas adam-beta1 adam-beta2 adam-betas momentum",
        "--optim.betas, such as --optim.betas 0.9 0.999",
    ),
    Habit(
        "lr-scheduler cos-lr lr-schedule lr-scheduler-type scheduler schedule cos cosine-lr",
        "--optim.schedule",
    ),
    Habit(
        "warmup warmup-steps warmup-epochs lr-warmup lr-warmup-steps lr-rampup",
        "--optim.schedule.warmup, a share of the run",
    ),
    Habit(
        "clip grad-clip clip-grad gradient-clip max-grad-norm gradient-clip-val clip-grad-norm",
        "--optim.clip",
    ),
    Habit(
        "ema-decay ema ema-rate ema-beta use-ema ema-halflife",
        "--ema.half-life; there is always an average",
    ),
    # Model
    Habit("model arch architecture backbone unet", "--network"),
    Habit(
        "dim base-channels model-channels channels num-channels hidden-dim ch cbase unet-dim",
        "--network.base",
    ),
    Habit(
        "dim-mults cres channel-mult channel-mults ch-mult channels-mult",
        "--network.mult, such as --network.mult 1 2 2",
    ),
    Habit("num-res-blocks layers-per-block num-blocks", "--network.blocks"),
    Habit("attention-resolutions attn-resolutions attention attn-levels", "--network.attention"),
    Habit("dropout", "--network.dropout"),
    Habit(
        "prediction-type predict parameterization parametrization objective-type pred",
        "--precond",
    ),
    Habit(
        "noise-schedule beta-schedule ddpm-num-steps ddpm-beta-schedule num-timesteps timesteps "
        "diffusion-steps num-diffusion-steps",
        "--precond ddpm for discrete steps, or --noise",
    ),
    Habit("p-mean", "--noise.mean"),
    Habit("p-std", "--noise.std"),
    Habit("sigma-data", "--precond.sigma-data"),
    Habit("snr-gamma min-snr-gamma min-snr-loss-weight", "--objective.weighting min-snr"),
    Habit("loss loss-type loss-weighting", "--objective.weighting"),
    Habit(
        "patch-size crop crop-size patches-size real-p",
        "--patches.fractions, sides relative to the image, and --patches.probs",
    ),
    Habit(
        "p-uncond cond-drop-prob class-dropout class-dropout-prob uncond-prob label-drop",
        "--label-dropout",
    ),
    # Machine
    Habit(
        "gpus num-gpus num-nodes local-rank ngpus n-gpus num-gpu nproc nproc-per-node "
        "num-processes devices world-size multi-gpu",
        "torchrun starts a process for each GPU: torchrun --nproc-per-node 2 -m patchdiffusion "
        "train ./photos",
        "train bench evaluate",
    ),
    Habit("gpu cuda use-gpu use-cuda", "--device cuda"),
    Habit("cpu no-cuda no-gpu use-cpu", "--device cpu"),
    Habit(
        "mixed-precision amp fp16 bf16 half dtype use-fp16 use-amp autocast",
        "--precision, such as --precision bf16",
    ),
    Habit("num-threads omp-threads cpu-threads", "--threads"),
    Habit("compile-model torch-compile torchcompile", "--compile"),
    Habit("random-seed manual-seed", "--seed"),
    # Runs
    Habit(
        "resume resume-from resume-from-checkpoint auto-resume continue continue-train last",
        "no flag is needed: the same command again resumes its run",
        "train",
    ),
    Habit(
        "checkpoint ckpt ckpt-path pretrained weights init init-from finetune fine-tune transfer "
        "load load-from",
        "--start-from RUN to start from its weights; the same command again resumes its run",
    ),
    Habit("overwrite force restart exist-ok", "--fresh"),
    Habit(
        "output outdir logging-dir default-root-dir output-dir output-path out-dir save-dir "
        "save-path savedir logdir log-dir workdir work-dir results-folder results-dir run-dir "
        "project exp-dir o",
        "--out",
    ),
    Habit("run-name exp-name exp experiment", "--name"),
    Habit(
        "save-every save-model-epochs save-period save-interval save-steps checkpointing-steps "
        "snap save-and-sample-every ckpt-every",
        "--save-minutes, or --keep-every to keep some for good",
    ),
    Habit(
        "sample-every save-images-epochs sample-interval sample-freq validation-steps "
        "validation-epochs preview-every eval-every",
        "--preview.samples, how many grids over the whole run",
    ),
    Habit(
        "log-every log-interval logging-steps log-freq tick print-every",
        "--preview.status, how many status lines over the whole run",
    ),
    Habit("wandb use-wandb wandb-project wandb-name", "--track wandb"),
    Habit("tensorboard tb", "--track tensorboard"),
    Habit("report-to log-with logger", "--track"),
    Habit(
        "fid calculate-fid metrics",
        "--preview.distance during training, or: patchdiffusion evaluate RUN",
    ),
    Habit(
        "cfg cfg-scale guidance-scale guidance guidance-weight",
        "--preview.guidance for the grids, or: patchdiffusion sample RUN --guidance cfg "
        "--guidance.weight 2",
    ),
    Habit("num-inference-steps sampling-timesteps sampling-steps", "--preview.sample-steps"),
    Habit("adam-epsilon adam-eps", "--optim.eps"),
    Habit(
        "cache-dir cache",
        "set the environment variable PATCHDIFFUSION_CACHE to a folder",
        "train prepare evaluate",
    ),
    Habit(
        "val val-dir validation-data val-split",
        "no flag is needed: a part of the images is held out; patchdiffusion prepare --holdout "
        "0.1 sets the share",
        "train",
    ),
    Habit("use-ddim ddim", "--solver ddim"),
    # Sampling
    Habit(
        "n num num-samples n-samples nsamples num-images n-images number samples images "
        "num-fid-samples k",
        "--count",
    ),
    Habit(
        "n num num-samples n-samples nsamples num-images n-images number count images "
        "num-fid-samples num-fid-images k",
        "--samples",
    ),
    Habit("seeds", "--seed, the first one, and --count"),
    Habit("batch-size batchsize bs max-batch-size", "--batch"),
    Habit(
        "num-steps sampling-steps sample-steps num-sampling-steps inference-steps nfe timesteps "
        "num-inference-steps ddim-steps timestep-respacing",
        "--steps",
    ),
    Habit("sampler sampler-name sampling-method sample-method method scheduler", "--solver"),
    Habit("noise-schedule sigma-schedule", "--schedule"),
    Habit("rho", "--schedule.rho"),
    Habit("s-churn churn", "--solver.churn.amount"),
    Habit("eta ddim-eta", "--solver ddim --solver.eta 0"),
    Habit(
        "size resolution image-size img-size imgsz width height w h res region",
        "--canvas region --canvas.size, such as --canvas region --canvas.size 64 96",
    ),
    Habit("size image-size img-size", "--resolution"),
    Habit("corner offset", "--canvas region --canvas.corner 0 0"),
    Habit(
        "cfg cfg-scale cfg-weight guidance-scale guidance-weight guidance-strength scale cfgs",
        "--guidance cfg --guidance.weight, such as --guidance cfg --guidance.weight 2",
    ),
    Habit("interval guidance-interval cfg-interval", "--guidance cfg --guidance.interval"),
    Habit("rescale guidance-rescale cfg-rescale", "--guidance cfg --guidance.rescale"),
    Habit(
        "autoguide autoguidance gnet guide-model",
        "--guidance autoguidance --guidance.model RUN",
    ),
    Habit("caption captions text texts", "--prompt, such as --prompt 'a red letter'"),
    Habit("negative-prompt neg-prompt", "--negative"),
    Habit(
        "caption caption-column caption-ext caption-extension text-encoder clip t5 "
        "train-text-encoder use-captions",
        "--captions bytes, or --captions PATH of a frozen text encoder",
    ),
    Habit("class label labels class-label class-labels class-idx class-cond y", "--classes"),
    Habit("raw no-ema use-ema ema", "--weights raw for the weights as trained"),
    Habit(
        "model model-path model-dir ckpt ckpt-path checkpoint checkpoint-path network run pkl "
        "load load-from",
        "no flag is needed: the folder of a run comes first, as in: patchdiffusion sample "
        "runs/photos",
        "sample evaluate average report",
    ),
    Habit("clip clamp clip-denoised dynamic-thresholding", "--threshold clamp"),
    Habit("grid no-grid save-grid grid-only", "--no-singles for the grid alone"),
    # Evaluation and the others
    Habit("ref real reference-path dataset data-dir data-path ref-path real-path", "--data"),
    Habit("output out output-file json", "--save"),
    Habit("extractor feature-extractor inception dinov2 fid metrics", "--features.extractor"),
    Habit("likelihood nll bpd bits-per-dim", "--bits.images"),
    Habit("width relative-std sigma-rel half-life", "--std"),
    Habit("iterations iters runs", "--repeats"),
    Habit("verbose v debug quiet q", "nothing: the amount of output is fixed"),
)
