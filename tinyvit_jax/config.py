"""Every key of a run with its default and what it means; `check` finds what cannot work.

A file in configs/ calls `default()` and changes what differs; the command line overrides any key by
`--config.section.key=value`.
"""

import ml_collections

OBJECTIVES = ("supervised", "stored_logits", "live_teacher")
KINDS = ("soft", "hard")
AUGMENTS = ("imagenet", "small", "none", "microsoft")
EVAL_CROPS = ("center", "square")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, what was found and what to do."""


def default() -> ml_collections.ConfigDict:
    """The complete configuration of a supervised run of TinyViT-5M on the embedded images."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # initial weights and drop path; the order and views of images hang on data.seed

    c.data = d = ml_collections.ConfigDict()
    d.source = "embedded"  # embedded | folder:/path | pack:/path | tfds:name | binary:/path
    d.eval_source = ""  # of the evaluation images; "" = the same source's own split
    d.train_split = "train"
    d.eval_split = "eval"  # val/ or test/ of a folder or pack, else 10 % held out; or a tfds split
    d.data_dir = ""  # where tensorflow-datasets keeps its files; "" = its own default
    d.seed = 0  # order of the images, seeds of the views; a store keeps its own
    # The student's normalisation, of pixels scaled to [0, 1]; () = that of model.init_from
    d.mean = (0.485, 0.456, 0.406)
    d.std = (0.229, 0.224, 0.225)
    d.workers = 0  # extra processes that prepare batches; 0 = threads of this one
    # Threads that prepare batches, in each worker; 0 = the cores that this process may use, shared
    # out among the workers
    d.threads = 0
    d.prefetch = 0  # batches kept ready for each thread; 0 = two, and in training more small ones
    # The whole set, decoded, in the memory of each device, and its views made there: for small sets
    # with augment.spec=small, whose updates then follow each other without the host
    d.resident = False

    c.augment = a = ml_collections.ConfigDict()
    # imagenet: random resized crop | small: pad and crop | none: centre | microsoft: the original's
    # own draws and PIL's pixels, for stores that tools/import_store.py brought in
    a.spec = "imagenet"
    # exact: area averages and bicubic of all pixels | fast: bilinear, and large JPEGs are decoded
    # at a fraction of their size | faster: also a long side that shrinks to a third is bilinear,
    # and translation is by whole pixels (docs/augmentation.md has the differences)
    a.pixels = "faster"
    a.scale = (0.08, 1.0)  # area of the random resized crop, as a fraction of the image
    a.ratio = (3 / 4, 4 / 3)  # its aspect ratio
    a.pad = 4  # pixels of zero padding around an image of "small" before its crop
    a.flip = 0.5  # probability of a horizontal flip
    a.rand_augment = "rand-m9-mstd0.5-inc1"  # timm's notation (docs/augmentation.md); "" = off
    a.color_jitter = 0.4  # brightness, contrast, saturation; used only where rand_augment is off
    a.greyscale = 0.0  # probability that a view loses its colours, after jitter or RandAugment
    a.erase = 0.25  # probability of random erasing (one rectangle of noise)
    a.mixup = 0.0  # alpha of the Beta distribution; 0 = no mixup
    a.cutmix = 0.0  # alpha; 0 = no CutMix
    a.mix_prob = 1.0  # probability that a pair is mixed at all, where mixup or cutmix is on
    a.mix_switch = 0.5  # probability of CutMix where both are on

    c.model = m = ml_collections.ConfigDict()
    _add_architecture(m)
    # One of tinyvit_jax.models.VARIANTS (tiny_vit, vit: one's own); "" = as init_from's weights are
    m.name = "tiny_vit_5m_224"
    m.num_classes = 0  # 0 = as many as the image source has
    m.drop_path = 0.0  # stochastic depth, the last block's rate
    m.dropout = -1.0  # of a ViT; -1 = the variant's own, which is 0.1 for vit_mini_patch4_32 alone
    m.dtype = "float32"  # of activations: float32 | bfloat16; weights, norms, softmax stay float32
    m.remat = False  # recompute the blocks' activations in the backward pass to save memory
    m.freeze_norm = False  # BatchNorm uses its stored statistics while training
    m.init_from = ""  # weights to start from: a workdir of ours, a .pth or a .safetensors
    m.class_names = ""  # file of the classes of init_from, one a line (or imagenet_1kto22k.txt)
    m.trainable = "all"  # all | head: the classifier alone learns, all before it stands still

    c.objective = o = ml_collections.ConfigDict()
    o.name = "supervised"  # supervised | stored_logits | live_teacher
    o.smoothing = 0.1  # of the labels, in the supervised and live_teacher objectives
    # Of both softmaxes, the teacher's and the student's; in stored_logits whatever was stored
    o.temperature = 1.0
    o.alpha = 0.5  # weight of a live teacher; the labels have the rest, none at 1
    o.kind = "soft"  # of a live teacher: soft, all its probabilities | hard, its top class alone

    c.store = s = ml_collections.ConfigDict()
    # Folder of the teacher-logit store, or gs:// or s3:// of one; "" = WORKDIR/store
    s.path = ""
    s.passes = 1  # views of each image to store (and the number that training expects)
    s.top_k = 10  # classes kept for each view; training may ask for fewer than were stored
    s.codec = "compact"  # of a new store: compact | float16, the original's own rounding
    s.temperature = 1.0  # of the teacher's softmax when it is stored
    s.tail = "uniform"  # the mass outside the top K: uniform over the other classes | none
    s.teacher = ""  # hash of the teacher's weights that training insists on, or how it begins
    # Training replays a few views and compares their pixels with the capture's: refuse | warn
    s.replay = "refuse"
    s.lease = 120.0  # seconds without a sign of life before others take a process's shard over
    s.cache = ""  # local folder for shards of a gs:// or s3:// store; "" = ~/.cache/tinyvit_jax
    s.cache_gb = 0.0  # the oldest files of the cache go beyond this size; 0 = no limit
    s.shard_views = 32768  # views in a shard: the unit of resume and of parallel capture
    # Views in a record: the unit of reading and of checksums; 0 = 4096 at 10 classes, 512 at 100
    s.block_views = 0
    s.capture = False  # main captures missing passes itself; else it says which command does

    c.teacher = t = ml_collections.ConfigDict()
    _add_architecture(t)
    t.name = ""  # a variant of ours, or module:function of a user's own
    t.weights = ""  # a workdir of ours, a .pth, a .safetensors; "" = train it by the recipe below
    t.mean = ()  # its normalisation; () = that of its workdir, and ImageNet's for a file
    t.std = ()
    t.dtype = "float32"  # of its activations: float32 | bfloat16
    # Further teachers, averaged with the first: workdirs, files or module:function
    t.ensemble = ()
    t.shard = False  # cut its weights over the devices, for one that does not fit on each
    t.batch_size = 256  # views of a capture's batch, and the most that a live teacher takes at once
    t.epochs = 0  # recipe of a teacher trained on the labels first; 0 = none
    t.learning_rate = 2e-3  # peak, unscaled
    t.smoothing = 0.0  # of its labels; a smoothed teacher tells less of the wrong classes

    c.optim = p = ml_collections.ConfigDict()
    p.learning_rate = 5e-4  # peak, for a global batch of 512: scaled by batch/512 if scale_by_batch
    p.warmup_learning_rate = 5e-7  # scaled likewise
    p.min_learning_rate = 5e-6  # scaled likewise
    p.scale_by_batch = True
    p.warmup_epochs = 5.0
    p.weight_decay = 0.05
    p.betas = (0.9, 0.999)
    p.eps = 1e-8
    p.clip_norm = 5.0  # of the global gradient; 0 = off
    p.layer_decay = 1.0  # factor of the learning rate from block to block towards the stem; 1 = off
    p.ema = 0.0  # decay of the averaged weights that are evaluated and exported; 0 = off

    c.train = r = ml_collections.ConfigDict()
    r.batch_size = 1024  # views in an update, over all devices and accumulation steps
    r.accumulate = 1  # micro-batches an update is summed over
    # An epoch is as many views as the source has images; one pass of a store with its own keys.
    r.epochs = 300.0
    r.max_skipped = 20  # updates with a non-finite gradient, in a row, before the run stops

    c.eval = e = ml_collections.ConfigDict()
    e.every_epochs = 1.0
    e.batch_size = 256
    e.crop = "center"  # center: short side to size / crop_ratio, then crop | square: resize
    e.crop_ratio = 224 / 256
    e.image_size = 0  # pixels at which --mode=eval measures; 0 = those of the training
    # Which classes compete: all of the evaluation set, or present: those it has images of.
    # auto: present for imagenet_a and imagenet_r, which show 200 of the 1,000.
    e.classes = "auto"
    e.checkpoint = "last"  # what --mode=eval measures: last, which every other use takes, or best

    c.checkpoint = k = ml_collections.ConfigDict()
    k.every_epochs = 1.0
    k.keep_last = 2
    k.keep_best = True  # by top-1

    c.benchmark = b = ml_collections.ConfigDict()  # of --mode=benchmark
    b.batch_sizes = (1, 8, 64)  # images over all devices
    b.dtypes = ("float32", "bfloat16")
    b.seconds = 5.0  # of measuring, for each batch size and dtype, after as much warming up

    c.compare = q = ml_collections.ConfigDict()  # of tools/compare_teachers.py
    # What teaches the student, one after the other: x2 (its own model at twice the width and heads)
    # or a variant's name, each trained first by the teacher section's recipe; a workdir, a file, or
    # module:function. x4>x2 is a chain: x4 teaches an assistant x2, which teaches the student.
    q.teachers = ("x2", "x4", "x4>x2")
    q.temperatures = ()  # each teacher at each of them; () = objective.temperature
    q.seeds = 1  # students of each teacher, from seed on; the views stay the same

    c.log_every = 50  # updates between lines of metrics.jsonl
    # Matrix products on a CPU by oneDNN: faster on Intel's with AVX-512, compiled at every start.
    c.onednn = False
    c.label_only_twin = False  # also train the student on labels alone, for the comparison
    c.export_torch = ""  # file of PyTorch weights to write at the end, in WORKDIR; "" = none
    return c


def _add_architecture(section: ml_collections.ConfigDict) -> None:
    """Adds the keys that override a variant's own shape."""
    section.image_size = 0  # pixels; 0 = the variant's own
    section.embed_dims = ()  # width of each stage; () = the variant's own, here and below
    section.depths = ()  # blocks of each stage
    section.num_heads = ()  # attention heads of each stage
    section.window_sizes = ()  # windows of each stage, in tokens
    section.stem_strides = ()  # of the stem's two convolutions; (2, 1) and (1, 1) for small images
    # Of a plain ViT (models/vit.py says more); 0 and "" = the variant's own here too
    section.patch_size = 0  # pixels
    section.mlp_dims = ()  # hidden width of its MLPs; () = the variant's, else 4 times its width
    section.token_layout = ""  # class | distilled: a class token, and a distillation token
    section.pool = ""  # what the head reads: token | mean of the patches' tokens
    section.positions = ""  # learned | sincos: fixed
    section.norm_order = ""  # pre | post: norms before the branches, or after the sums
    section.layer_scale = 0.0  # factor that a block's branches start with


def check(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for the first setting that cannot work."""

    def need(ok: bool, key: str, found: object, expected: str) -> None:
        if not ok:
            raise ConfigError(
                f"--config.{key}={found} cannot work: expected {expected}. Set it on the command "
                f"line as --config.{key}=VALUE, or in the config file."
            )

    def one_of(key: str, found: str, choices: tuple[str, ...]) -> None:
        need(found in choices, key, found, "one of " + ", ".join(choices))

    c = config
    one_of("objective.name", c.objective.name, OBJECTIVES)
    one_of("objective.kind", c.objective.kind, KINDS)
    need(0 <= c.objective.alpha <= 1, "objective.alpha", c.objective.alpha, "a weight in [0, 1]")
    if c.objective.name == "live_teacher" and c.objective.kind == "hard":
        only = "1.0 where --config.objective.kind=hard: a top class has no temperature"
        need(c.objective.temperature == 1, "objective.temperature", c.objective.temperature, only)
        need(set(c.compare.temperatures) <= {1}, "compare.temperatures", c.compare.temperatures,
             only)
    need(not c.data.resident or c.objective.name == "supervised", "data.resident", True,
         f"False where --config.objective.name={c.objective.name}: a store is read by the host, "
         f"and a live teacher is a program of its own")
    one_of("augment.spec", c.augment.spec, AUGMENTS)
    one_of("eval.crop", c.eval.crop, EVAL_CROPS)
    one_of("augment.pixels", c.augment.pixels, ("exact", "fast", "faster"))
    one_of("store.codec", c.store.codec, ("compact", "float16"))
    one_of("store.tail", c.store.tail, ("uniform", "none"))
    one_of("store.replay", c.store.replay, ("refuse", "warn"))
    one_of("eval.classes", c.eval.classes, ("auto", "all", "present"))
    one_of("model.trainable", c.model.trainable, ("all", "head"))
    one_of("eval.checkpoint", c.eval.checkpoint, ("last", "best"))
    for section in ("model", "teacher"):
        one_of(f"{section}.dtype", c[section].dtype, ("float32", "bfloat16"))
    for section, key in (("train", "batch_size"), ("train", "accumulate"), ("eval", "batch_size"),
                         ("store", "passes"), ("store", "top_k"),
                         ("teacher", "batch_size"), ("checkpoint", "keep_last")):
        need(c[section][key] >= 1, f"{section}.{key}", c[section][key], "a whole number >= 1")
    need(c.log_every >= 1, "log_every", c.log_every, "a whole number >= 1")
    for section, key, low in (("data", "prefetch", 0), ("data", "workers", 0),
                              ("data", "threads", 0), ("augment", "pad", 0),
                              ("eval", "image_size", 0), ("model", "image_size", 0),
                              ("teacher", "image_size", 0),
                              ("augment", "color_jitter", 0), ("teacher", "epochs", 0)):
        need(c[section][key] >= low, f"{section}.{key}", c[section][key], f"{low} or more")
    starts = bool(c.model.init_from or not c.model.name)  # from weights, or names none at all
    need(len(c.data.mean) == len(c.data.std) in ((0, 3) if starts else (3,)),
         "data.mean", c.data.mean, "3 numbers, and 3 in data.std; or () for both, to take those of "
         "model.init_from")
    for section, key, length in (("augment", "scale", 2), ("augment", "ratio", 2),
                                 ("optim", "betas", 2)):
        need(len(c[section][key]) == length, f"{section}.{key}", c[section][key],
             f"{length} numbers")
    for section in ("data", "teacher"):
        std = c[section].std
        need(min(std, default=1) > 0, f"{section}.std", std, "numbers above 0")
    need(len(c.teacher.mean) == len(c.teacher.std) in (0, 3), "teacher.mean", c.teacher.mean,
         "3 numbers, and 3 in teacher.std; or () for both")
    for section in ("train", "eval", "checkpoint"):
        key = "epochs" if section == "train" else "every_epochs"
        need(c[section][key] > 0, f"{section}.{key}", c[section][key], "a number above 0")
    views = 2 * c.train.accumulate if mixes(c) else c.train.accumulate
    need(c.train.batch_size % views == 0, "train.batch_size", c.train.batch_size,
         f"a multiple of {views} (train.accumulate, times 2 where views are mixed in pairs)")
    need(c.store.block_views % 2 == 0, "store.block_views", c.store.block_views, "an even number")
    need(c.store.block_views >= 0, "store.block_views", c.store.block_views, "0 or more")
    block = c.store.block_views or 256  # the least that is chosen where it is 0
    need(c.store.shard_views % block == 0, "store.shard_views", c.store.shard_views,
         f"a multiple of store.block_views ({block})")
    for key in ("mixup", "cutmix"):
        need(0 <= c.augment[key] <= 4, f"augment.{key}", c.augment[key], "an alpha from 0 to 4")
    for key in ("flip", "greyscale", "erase", "mix_prob", "mix_switch"):
        need(0 <= c.augment[key] <= 1, f"augment.{key}", c.augment[key], "a probability")
    for section, key in (("objective", "temperature"), ("store", "temperature"),
                         ("store", "lease")):
        need(c[section][key] > 0, f"{section}.{key}", c[section][key], "a number above 0")
    need(all(c.teacher.ensemble), "teacher.ensemble", c.teacher.ensemble,
         "workdirs, files or module:function, none of them empty")
    need(c.store.cache_gb >= 0, "store.cache_gb", c.store.cache_gb, "0 or more")
    for section in ("objective", "teacher"):
        need(0 <= c[section].smoothing < 1, f"{section}.smoothing", c[section].smoothing,
             "a number in [0, 1)")
    need(0 <= c.model.drop_path < 1, "model.drop_path", c.model.drop_path, "a rate in [0, 1)")
    need(c.model.dropout == -1 or 0 <= c.model.dropout < 1, "model.dropout", c.model.dropout,
         "a rate in [0, 1), or -1 for the variant's own")
    need(0 < c.eval.crop_ratio <= 1, "eval.crop_ratio", c.eval.crop_ratio, "a ratio in (0, 1]")
    for key, unset in (("trainable", "all"), ("class_names", "")):
        need(c.model[key] == unset or starts, f"model.{key}", c.model[key],
             f"weights to start from in model.init_from, or {unset or 'nothing'}")
    b = c.benchmark
    need(min(b.batch_sizes, default=0) >= 1, "benchmark.batch_sizes", b.batch_sizes,
         "whole numbers >= 1")
    need(set(b.dtypes) <= {"float32", "bfloat16"} and len(b.dtypes) > 0, "benchmark.dtypes",
         b.dtypes, "float32, bfloat16 or both")
    need(b.seconds > 0, "benchmark.seconds", b.seconds, "a number above 0")
    q = c.compare
    need(len(q.teachers) > 0 and all(part for t in q.teachers for part in t.split(">")),
         "compare.teachers", q.teachers, "at least one, none of them empty")
    need(min(q.temperatures, default=1) > 0, "compare.temperatures", q.temperatures,
         "numbers above 0")
    need(q.seeds >= 1, "compare.seeds", q.seeds, "a whole number >= 1")
    p = c.optim
    need(0 < p.layer_decay <= 1, "optim.layer_decay", p.layer_decay, "a factor in (0, 1]")
    need(0 <= p.ema < 1, "optim.ema", p.ema, "a decay in [0, 1)")
    need(p.learning_rate > 0, "optim.learning_rate", p.learning_rate, "a number above 0")


def mixes(config: ml_collections.ConfigDict) -> bool:
    """Whether views are mixed in pairs."""
    a = config.augment
    return a.mix_prob > 0 and (a.mixup > 0 or a.cutmix > 0)
