"""Training: one step function and one loop for every objective.

Step s is a pure function of (config, s, state). Resuming is restoring the state and starting the
stream of batches at its step; nothing else remembers anything.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from tinyvit_jax import (
    checkpoint,
    evaluate,
    heads,
    live,
    log,
    measure,
    memory,
    mix,
    models,
    objectives,
    onednn,
    optim,
    packing,
    teachers,
    weights,
)
from tinyvit_jax import feed as feeds
from tinyvit_jax import mesh as meshes
from tinyvit_jax.config import mixes
from tinyvit_jax.data import augment, images, pipeline
from tinyvit_jax.data.order import AnyOrder, Order
from tinyvit_jax.matching import check_replay, check_store, record_store
from tinyvit_jax.program import (
    Program,
    compiling,
    count_compilations,
    describe_arrays,
    run_once,
)
from tinyvit_jax.resume import record_config
from tinyvit_jax.store import store as stores


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


class State(NamedTuple):
    """Everything that one update changes."""

    step: jax.Array  # int32, updates done
    params: dict
    batch_stats: dict
    opt_state: Any
    ema: dict  # averaged parameters; empty where optim.ema is 0
    skipped: jax.Array  # int32, updates skipped in a row for a non-finite gradient


class Data(NamedTuple):
    """The images of a run and how they are shown."""

    train: images.ImageSource
    eval: images.ImageSource
    order: AnyOrder
    class_map: Any  # int32 [C'] from evaluated to trained classes, or None


def open_data(config: ml_collections.ConfigDict, evaluated: bool = True) -> Data:
    """Opens the image sources of a config; `evaluated` = False leaves the evaluation images out."""
    d = config.data
    train = images.open_source(d.source, d.train_split, d.data_dir)
    names = _class_names(config, train)
    held_out = open_eval_source(config) if evaluated else train
    return Data(train, held_out, Order(d.seed, len(train), mixes(config)),
                evaluate.make_class_map(names, held_out.class_names))


def open_eval_source(config: ml_collections.ConfigDict) -> images.ImageSource:
    """Opens the evaluation images of a config."""
    d = config.data
    return images.open_source(d.eval_source or d.source, d.eval_split, d.data_dir)


def _class_names(config: ml_collections.ConfigDict, train: images.ImageSource) -> tuple[str, ...]:
    """The source's classes; a model.num_classes that contradicts them is an error."""
    wanted = config.model.num_classes
    if wanted and wanted != len(train.class_names):
        raise ValueError(f"--config.model.num_classes={wanted} contradicts {train.name}, which has "
                         f"{len(train.class_names)} classes. Leave it at 0 to take the source's.")
    return tuple(train.class_names)


def make_student(config: ml_collections.ConfigDict, data: Data):
    """The model to train."""
    m = weights.complete(config.model)
    options = {"dropout": m.dropout} if m.dropout >= 0 else {}
    return weights.make_model(m, len(data.train.class_names), drop_path=m.drop_path, dtype=m.dtype,
                              remat=m.remat,
                              freeze_norm=m.freeze_norm or m.trainable != "all", **options)


def count_steps(config: ml_collections.ConfigDict, views: int) -> tuple[int, float]:
    """Updates in the run, and in an epoch of so many views."""
    per_epoch = views / config.train.batch_size
    return max(1, round(config.train.epochs * per_epoch)), per_epoch


def init_state(config: ml_collections.ConfigDict, model, class_names: tuple[str, ...] = ()
               ) -> State:
    """The state before the first update, from `model.init_from` or from the seed."""
    m = config.model
    if m.init_from:
        known = heads.read_class_names(m.class_names, imagenet_names=class_names) if (
            m.class_names) else ()
        loaded = weights.load_weights(m.init_from, model, "new", class_names, trained_names=known)
        return jax.jit(lambda variables: _first_state(config, variables))(loaded)
    return run_once(lambda key: _first_state(config, _init_variables(model, key)),
                    jax.random.key(config.seed))


def _init_variables(model, key: jax.Array) -> dict:
    """{"params", "batch_stats"} of a new model."""
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    return model.init(key, image, train=False)


def _first_state(config: ml_collections.ConfigDict, variables: dict) -> State:
    params, zero = variables["params"], jnp.zeros((), jnp.int32)
    vectors = optim.pack_by_decay(params).pack(params)
    return State(zero, params, variables["batch_stats"],
                 optim.make_optimizer(config.optim).init(vectors),
                 params if config.optim.ema else {}, zero)


def describe_state(config: ml_collections.ConfigDict, model, mesh: Mesh) -> State:
    """The shapes of the state, on every device, without computing it."""
    shapes = jax.eval_shape(
        lambda key: _first_state(config, _init_variables(model, key)),
        jax.random.key(config.seed))
    return describe_arrays(shapes, meshes.replicated(mesh))


def make_objective(config: ml_collections.ConfigDict, model) -> Callable:
    """What a run's student learns by; raises ValueError where the two do not go together."""
    return objectives.make_objective(config.objective, config.store.temperature,
                                     config.store.tail, models.has_distillation_token(model))


def make_train_step(config: ml_collections.ConfigDict, model, schedule: Callable, mesh: Mesh
                    ) -> Callable:
    """The compiled update: fn(state, batch) -> (state, metrics), state donated.

    Args:
        config: of the run.
        model: the student.
        schedule: step -> learning rate.
        mesh: over which batches are cut.
    """
    objective, optimizer = make_objective(config, model), optim.make_optimizer(config.optim)
    parts, decay = config.train.accumulate, config.optim.ema
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    seed, trainable = config.seed, config.model.trainable

    def apply(variables: dict, pixels: jax.Array, key: jax.Array, method: str | None = None):
        logits, new = model.apply(variables, pixels, train=True, rngs={"drop_path": key},
                                  mutable=["batch_stats"], method=method)
        return logits, new["batch_stats"]

    def gradient(params: dict, batch_stats: dict, batch: dict, key: jax.Array):
        batch = {**batch, "image": mix.normalize(mix.view_pixels(batch), mean, std)}

        def loss(p):
            p = optim.hold_frozen(p, trainable)
            return objective(apply, {"params": p, "batch_stats": batch_stats}, batch, key)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, aux["batch_stats"], {"loss": value, **aux["metrics"]}

    def summed_gradient(state: State, batch: dict, key: jax.Array):
        if parts == 1:
            return gradient(state.params, state.batch_stats, batch, key)

        def body(carry, part):
            batch_stats, total = carry
            grads, batch_stats, metrics = gradient(state.params, batch_stats, part[1],
                                                   jax.random.fold_in(key, part[0]))
            # Added up as they come: all of them side by side would be memory for each part.
            return (batch_stats, jax.tree.map(jnp.add, total, grads)), metrics

        first = (state.batch_stats, jax.tree.map(jnp.zeros_like, state.params))
        (batch_stats, total), metrics = jax.lax.scan(
            body, first, (jnp.arange(parts), _micro_batches(batch, parts)))
        return (jax.tree.map(lambda x: x / parts, total), batch_stats,
                jax.tree.map(lambda x: x.mean(0), metrics))

    def train_step(state: State, batch: dict) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, batch_stats, metrics = summed_gradient(state, batch, key)
        layout = optim.pack_by_decay(state.params)
        grads, params = layout.pack(grads), layout.pack(state.params)
        averaged = layout.pack(state.ema) if decay else {}
        grad_norm = packing.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        rate = schedule(state.step)
        factors = optim.make_factors(config.optim, state.params, model.depths, trainable)
        if factors is not None:
            updates = jax.tree.map(jnp.multiply, updates, layout.spread(factors(state.step)))
        updates = jax.tree.map(lambda u: -rate * u, updates)
        moved = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, averaged, moved) if (
            decay) else {}
        # A non-finite gradient must not reach the weights; the step still counts.
        good = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
        kept = jax.tree.map(lambda new, before: jnp.where(good, new, before),
                            (moved, batch_stats, opt_state, ema),
                            (params, state.batch_stats, state.opt_state, averaged))
        skipped = jnp.where(good, 0, state.skipped + 1).astype(jnp.int32)
        metrics |= {"learning_rate": rate, "gradient_norm": grad_norm,
                    "parameter_norm": packing.norm(params),
                    "update_norm": packing.norm(updates), "skipped": skipped}
        moved, batch_stats, opt_state, ema = kept
        return State(state.step + 1, layout.unpack(moved), batch_stats, opt_state,
                     layout.unpack(ema) if decay else {}, skipped), metrics

    whole = meshes.replicated(mesh)
    # A resident set's loop is the program that this one is a part of.
    compiled = jax.jit if config.data.resident else onednn.jit
    return compiled(train_step, donate_argnums=0, out_shardings=(whole, whole))


def _micro_batches(batch: dict, parts: int) -> dict:
    """Cuts a batch into `parts`, pair by pair in turn: [B, ...] -> [parts, B/parts, ...].

    Every part takes pairs from all over the batch, so each device keeps its own rows and the parts
    do not depend on how many devices there are.
    """
    def cut(name: str, x: jax.Array) -> jax.Array:
        unit = 1 if name in ("lam", "box") else 2  # rows of a pair stay together
        if x.shape[0] % (unit * parts):
            unit = 1
        shape = (x.shape[0] // (unit * parts), parts, unit, *x.shape[1:])
        return jnp.moveaxis(x.reshape(shape), 1, 0).reshape(parts, -1, *x.shape[1:])

    return {name: cut(name, x) for name, x in batch.items()}


def fit(config: ml_collections.ConfigDict, workdir: Path, data: Data,
        store: stores.Store | None = None, title: str = "train",
        teacher: teachers.Teacher | None = None) -> dict:
    """Trains from whatever state the workdir holds to the end of the run.

    Args:
        config: a checked config.
        workdir: gets config.json, store.json, model.json, metrics.jsonl, checkpoints/, fit.json.
        data: from `open_data`.
        store: the teacher's targets, for the stored_logits objective.
        title: what the progress bar says.
        teacher: for the live_teacher objective, at its temperature.

    Returns:
        The content of fit.json: top1, top5, loss, steps, seconds, parameters, peak_bytes (of memory
        on each device); top1_before, top5_before where the run started from weights; compilations,
        where programs were compiled after the first update.
    """
    mesh = meshes.make_mesh()
    model = make_student(config, data)
    spec = augment.make_spec(config.augment, model.image_size)
    if store is not None:
        check_store(store, config, data, spec, alone=jax.process_count() == 1)
        check_replay(store, data, spec, config.store.replay)
    meshes.check_rows(config.train.batch_size, "train.batch_size",
                      config.train.accumulate * (2 if mixes(config) else 1))
    record_config(config, workdir, {"train": data.train.fingerprint,
                                    "eval": data.eval.fingerprint}, live.describe_teacher(teacher))
    if store is not None:
        record_store(store, workdir, write=jax.process_index() == 0)
    steps, per_epoch = count_steps(config, data.order.views_per_epoch)
    schedule = optim.make_schedule(config.optim, config.train.batch_size, steps, per_epoch)

    with checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep_last,
                                config.checkpoint.keep_best) as checkpoints, \
            compiling() as compiler:
        done = log.read_json(workdir / "fit.json")
        if done is not None and checkpoints.latest == steps:
            return done
        start = checkpoints.latest or 0
        like = describe_state(config, model, mesh)
        feed = feeds.open_feed(
            feeds.Run(config, pipeline.Views(data.train, spec, data.order, store,
                                             config.store.passes, config.store.top_k),
                      steps, start, len(data.train.class_names), mesh, compiler, title),
            like, make_train_step(config, model, schedule, mesh), teacher)
        if start:
            state = State(**checkpoints.restore(start, like._asdict()))
            log.logger.info("%s: resumed at update %d of %d", title, start, steps)
        else:
            state = meshes.put_state(init_state(config, model, tuple(data.train.class_names)),
                                     mesh)
        if jax.process_index() == 0:
            log.write_json(workdir / "model.json", weights.describe(weights.Trained(
                model, {}, data.train.class_names, config.data.mean, config.data.std,
                config.eval.crop, config.eval.crop_ratio), config.model.name))
        judge, _ = measure.make_judge(config, model, data.eval, data.class_map, mesh)
        evaluation = Program(
            judge.eval_step, ({"params": like.params, "batch_stats": like.batch_stats},
                              judge.describe_batch()), compiler, f"{title}: the evaluation")

        def evaluator(variables: dict) -> dict:
            evaluation.wait()  # else it would be compiled here a second time
            return evaluate.score(judge(variables))

        with memory.explaining(config):
            result = _loop(config, workdir, state, per_epoch, feed, evaluator, checkpoints)
    result["parameters"] = sum(x.size for x in jax.tree.leaves(like.params))
    result |= _scores_before(workdir / "metrics.jsonl")
    if jax.process_index() == 0:
        log.write_json(workdir / "fit.json", result)
    return result


def _announce(config: ml_collections.ConfigDict, feed: feeds.Streamed | feeds.Resident) -> int:
    """Waits for the compiled update and says what it needs; gives its peak memory in bytes.

    Raises:
        OutOfMemory: it does not fit on the devices.
    """
    needs, ahead, seconds = feed.measure()
    limit = memory.find_limit()
    if jax.process_index() == 0:
        log.logger.info("%s: compiled in %.1f s, %s", feed.run.title, seconds,
                        memory.describe(needs, ahead, limit))
    memory.check_fits(config, needs, ahead, limit)
    return needs.peak + ahead


def _loop(config, workdir: Path, state: State, per_epoch: float,
          feed: feeds.Streamed | feeds.Resident, evaluator: Callable,
          checkpoints: checkpoint.Checkpoints) -> dict:
    """Batch, teacher, step, log, evaluate, save; until all batches were shown.

    The host never waits for a device between two log lines, but where it is too far ahead.
    """
    done, steps, title = feed.run.start, feed.run.steps, feed.run.title
    first = jax.process_index() == 0
    log_at = set(range(config.log_every, steps + 1, config.log_every))
    eval_at = _marks(config.eval.every_epochs, per_epoch, steps)
    save_at = _marks(config.checkpoint.every_epochs, per_epoch, steps)
    progress = log.Progress(title, steps, done, workdir / "metrics.jsonl" if first else None,
                            quiet=not first)
    meter = feed.open(workdir)
    scores, result = {}, {}
    if config.model.init_from and not done:  # what the weights are worth before any update
        scores = evaluator({"params": state.params, "batch_stats": state.batch_stats})
        progress.report(0, {f"eval_{k}": scores[k] for k in ("top1", "top5", "loss")}
                        | {"seconds": 0.0})
    built = None
    if done < steps:
        feed.prepare()
        result["peak_bytes"] = _announce(config, feed)
    meter.forget_time()
    for step in feed.stops(log_at, eval_at, save_at):
        state, metrics = feed.advance(state, step)
        if built is None:
            built = count_compilations()
        meter.add(metrics, step - done)
        progress.advance(step - done)
        done = step
        if step in log_at or step in eval_at or step in save_at:
            line, eta = meter.read(step)
            if line["skipped"] >= config.train.max_skipped:
                raise TrainingError(
                    f"{title}: the last {int(line['skipped'])} updates before {step} had a "
                    f"non-finite gradient and were skipped. Lower --config.optim.learning_rate, or "
                    f"set --config.model.dtype=float32; the newest checkpoint is finite.")
            if step in eval_at:
                scores = evaluator({"params": state.ema or state.params,
                                    "batch_stats": state.batch_stats})
                line |= {f"eval_{k}": scores[k] for k in ("top1", "top5", "loss")}
                meter.forget_time()
            if count_compilations() > built:
                result["compilations"] = line["compilations"] = count_compilations() - built
            progress.report(step, line, eta)
        if step in save_at:
            checkpoints.save(step, state._asdict(), scores["top1"] if step in eval_at else None)
        if step < steps:
            feed.prepare()  # after a checkpoint is safe, before waiting for the update
        feed.hold()
    progress.close()
    if not scores:  # a run that was killed after its last update
        scores = evaluator({"params": state.ema or state.params, "batch_stats": state.batch_stats})
    return {**scores, **result, "steps": steps, "seconds": meter.seconds()}


def _scores_before(metrics: Path) -> dict[str, float]:
    """{"top1_before", "top5_before"} of a run that started from weights; else nothing."""
    first = log.read_metrics(metrics)[:1]
    return {f"{k}_before": line[f"eval_{k}"] for line in first if line["step"] == 0
            for k in ("top1", "top5")}


def _marks(every_epochs: float, per_epoch: float, steps: int) -> set[int]:
    """Updates after which something happens every so many epochs, the last one included."""
    gap = max(1.0, every_epochs * per_epoch)
    return {round(i * gap) for i in range(1, int(steps / gap) + 1)} | {steps}
