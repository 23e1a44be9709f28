"""What main and the tools share: the flags that name a run, and errors that people can read."""

import contextlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from tinyvit_jax import compile_cache, log
from tinyvit_jax import config as configs


def define_flags() -> None:
    """Defines --config and --workdir."""
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/; any key: --config.section.key=value.",
        lock_config=True)
    flags.DEFINE_string("workdir", None,
                        "Where the run lives and resumes; default runs/NAME_OF_CONFIG.")
    flags.mark_flag_as_required("config")


def define_process_flags() -> None:
    """Defines the flags by which several processes become one run."""
    flags.DEFINE_bool("distributed", False,
                      "Join the other processes that Slurm, a TPU pod or Open MPI started.")
    flags.DEFINE_string("coordinator", None,
                        "HOST:PORT of process 0, where no scheduler says it.")
    flags.DEFINE_integer("processes", None, "How many processes, with --coordinator.")
    flags.DEFINE_integer("process", None, "This process's number, with --coordinator.")


def join_processes() -> None:
    """Joins the other processes, where the flags ask for it; before anything else uses JAX."""
    import jax

    f = flags.FLAGS
    if f.distributed or f.coordinator:
        jax.distributed.initialize(f.coordinator, f.processes, f.process)


def read_flags() -> tuple[ml_collections.ConfigDict, Path]:
    """The checked config and the workdir of the command line."""
    config = flags.FLAGS.config
    configs.check(config)
    stem = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return config, Path(flags.FLAGS.workdir or Path("runs") / stem)


def typed_flags() -> str:
    """The --config and --workdir flags of this command line, for a message that repeats them."""
    words, own = sys.argv[1:], []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith(("--config", "--workdir")):
            own += [word] if "=" in word else [word, following]
    return shlex.join(own)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, so that a second start compiles nothing.

    They lie in ~/.cache/tinyvit_jax/xla, or where JAX_COMPILATION_CACHE_DIR says;
    JAX_ENABLE_COMPILATION_CACHE=false does without.
    """
    import jax

    settings: Any = jax.config  # its fields are made at run time
    if not settings.jax_enable_compilation_cache:
        return
    folder = settings.jax_compilation_cache_dir
    if not folder:
        folder = str(Path("~/.cache/tinyvit_jax/xla").expanduser())
        settings.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if "://" not in folder:  # a bucket shows an entry only when it is whole
        compile_cache.remove_cut_entries(Path(folder))


def use_onednn(config: ml_collections.ConfigDict) -> None:
    """Turns oneDNN on for this process where the config asks for it; a warning where none is."""
    from tinyvit_jax import onednn

    if config.onednn and not onednn.turn_on():
        log.logger.warning("--config.onednn=True changes nothing here: it needs a CPU as JAX's "
                           "device and an XLA with oneDNN, such as jax 0.10 and 0.12 on Linux.")


def keep_freed_memory() -> None:
    """On a machine without accelerators, starts this process anew with another way of allocating.

    XLA asks for the working memory of a program anew at every call, and the kernel clears each page
    of it again: a third of a training step on a CPU. So memory that was freed is kept and used
    again, in pages of 2 MB, and all of it is in one arena: the others consist of heaps of 64 MB,
    which go back to the kernel when they are empty, whatever the settings say. glibc is told before
    a process begins; other C libraries, and for the pages one older than 2.35, pass over it.

    How many small pieces a thread keeps (tcache_count) stays at glibc's 7. With more, compiling
    takes a tenth less, as its threads wait less for each other; but a large block is cut to its
    alignment when it is handed out, and a thread that keeps the cut-off ends never lets them join
    the block again: the next one of the same size does not fit where the last one was, and the
    memory of a process grows with every batch of inference.

    Only for a process that is a command, as the first thing: what it did before is done again.
    """
    told = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc." in told or any(
            map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return  # where the device brings its own memory, the host's threads want arenas of theirs
    tunables = ":".join(filter(None, (told, *_KEEPING_MEMORY)))
    with contextlib.suppress(OSError):  # then it goes on as it is
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": tunables})


_KEEPING_MEMORY = ("glibc.malloc.mmap_max=0", f"glibc.malloc.trim_threshold={1 << 46}",
                   "glibc.malloc.hugetlb=1", "glibc.malloc.arena_max=1")


def run_command(main: Callable[[], int | None]) -> None:
    """Parses the flags and runs `main`; an error of the user's is one paragraph and exit code 1.

    With TINYVIT_TRACEBACK=1 in the environment the whole traceback is shown.
    """
    def start(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise configs.ConfigError(
                f"Unknown argument {argv[1]}. Settings are written --config.section.key=value.")
        logging.set_verbosity(logging.ERROR)  # orbax tells of every file it touches
        log.set_up_logging()
        return main()

    try:
        app.run(start, flags_parser=_parse)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("TINYVIT_TRACEBACK"):
            raise
        _fail(f"error: {_explain(error)}\n")


def _fail(message: str) -> None:
    """Ends the process with a message that nothing follows.

    Threads that prepare batches or read files would go on, and report in turn.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(terminal, message.encode())
    os._exit(1)


def _parse(argv: list[str]) -> list[str]:
    """Parses the command line; what does not parse is an error of one paragraph too."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {_explain(error)} Settings are written --config=configs/FILE.py[:STAGE] "
                 f"--config.section.key=value; tinyvit_jax/config.py lists all keys.")


_QUOTES = "'\"\\"


def _explain(error: BaseException) -> str:
    """The heart of what absl and ml_collections wrap into several lines, a traceback at times."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, KeyError | AttributeError):
        key, _, advice = text.replace("\\n", "\n").partition("\n")
        advice = advice.rstrip("'\"")
        return f"The config has no key {key.strip(_QUOTES)}. {advice}".strip()
    own = text.rpartition(f"{configs.ConfigError.__name__}: ")[2]
    lines = [line.strip() for line in own.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith("Pass --help"))
