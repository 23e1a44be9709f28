"""A teacher that runs while the student learns: each batch gets its answers before its update.

It is a program of its own between fetching a batch and the update, so the update stays
(state, batch) -> (state, metrics), whatever teaches. Its weights are frozen: they are in no state
and no checkpoint, and no gradient reaches them.
"""

from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tinyvit_jax import mesh as meshes
from tinyvit_jax import mix
from tinyvit_jax.memory import Memory, count_bytes
from tinyvit_jax.program import Program
from tinyvit_jax.teachers import Teacher, TeacherError

Shapes = dict[str, jax.ShapeDtypeStruct]


class Teaching:
    """Adds the answers of a live teacher to batches; without a teacher batches stay as they are.

    Args:
        teacher: from `teachers.make_teacher`, at the objective's temperature; or None.
        wanted: whether the objective learns from one.
        shapes: of the batches, as they come from the pipeline.
        classes: C.
        mesh: over which batches are cut.
        compiler: compiles the teacher's programs, in the background.
        title: of the run, for messages.

    Raises:
        TeacherError: a teacher is wanted and there is none, or there is one and nobody asks it.
    """

    def __init__(self, teacher: Teacher | None, wanted: bool, shapes: Shapes, classes: int,
                 mesh: Mesh, compiler: Executor, title: str):
        if wanted != (teacher is not None):
            raise TeacherError(f"A teacher is needed where --config.objective.name=live_teacher, "
                               f"and only there: fit() of {title} was given "
                               f"{'one' if teacher else 'none'}.")
        self.teacher, self.shapes, self._mesh = teacher, shapes, mesh
        self._programs: list[Program] = []
        self._own = 0
        if teacher is None:
            return
        rows, image = meshes.sharded(mesh), shapes["image"]
        pixels = jax.ShapeDtypeStruct(image.shape, jnp.float32, sharding=rows)
        answers = jax.ShapeDtypeStruct((image.shape[0], classes), jnp.float32, sharding=rows)
        self.shapes = {**shapes, "log_prob": answers}
        self._view_pixels = jax.jit(mix.view_pixels, out_shardings=rows)
        self._own = count_bytes(pixels)
        self._programs = [
            Program(function, (_describe(variables), pixels), compiler, f"{title}: the teacher")
            for function, variables in teacher.programs]

    def __call__(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """A batch, and "log_prob" float32 [B, C] of the very pixels that its student sees."""
        if self.teacher is None:
            return batch
        for program in self._programs:
            program.wait()  # else it would be compiled here a second time
        return {**batch, "log_prob": self.teacher.log_probs(self._view_pixels(batch))}

    def add_memory(self, update: Memory) -> Memory:
        """What an update and its teacher hold on each device, from what the update alone does.

        The teacher's weights are there all the time, and so are the pixels and answers of a batch.
        A device runs one program after the other: of their working memories the largest counts.
        That of a user's own function nobody knows.
        """
        found = [program.wait()[0] for program in self._programs]
        return Memory(
            update.arguments + self._own + sum(count_bytes(p.shapes[0]) for p in self._programs),
            update.outputs + sum(m.outputs for m in found),
            max([update.temporaries, *(m.temporaries for m in found)]),
            update.program + sum(m.program for m in found))


def describe_teacher(teacher: Teacher | None) -> dict[str, Any]:
    """What a resumed run must agree on besides its config: whose answers it learns, not its name.

    Returns:
        {"live_teacher": hash of its weights, size, normalisation and type}, of a user's function
        the name too, as the hash is that of its whole file; {} without a teacher.
    """
    return {"live_teacher": _drop_names(teacher.description)} if teacher else {}


def _drop_names(description: dict[str, Any]) -> dict[str, Any]:
    """A description without the names of models, its own and those that it averages."""
    own = {k: v for k, v in description.items() if k != "name" or ":" in v}
    return own | ({"members": [_drop_names(m) for m in own["members"]]} if "members" in own else {})


def _describe(variables: Any) -> Any:
    """The shapes of arrays, each where it is."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                        variables)
