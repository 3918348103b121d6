"""What every test starts from and leaves behind, and the lanes: which tests are slow, start processes, or compile.

A lane is a marker (pyproject.toml lists them); most are set here by rule. ``pytest -m "not slow"`` is the fast lane.
"""

import os

# Several workers share the machine; a test that needs threads sets them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import gc
import multiprocessing.process
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# A shell ignores Ctrl+C in what it starts in the background, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set by Lightning for its own children; a test must not hand them to the next one.
_LEAKING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """Seed, and restore what Lightning changes of a process: environment, signal handlers, process group."""
    torch.manual_seed(0)
    environment = {name: os.environ.get(name) for name in _LEAKING}
    main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGINT, signal.SIGTERM]
    handlers = {s: signal.getsignal(s) for s in signals}
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if main:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(deterministic)
    if gloo_is_open():
        gc.collect()
        assert not gloo_is_open(), (
            "the test has left a group of gloo open: children forked from here would wait for ever"
        )


def gloo_is_open() -> bool:
    """Return whether this process has a group of gloo, whose threads a forked child has not."""
    tasks = Path("/proc/self/task")
    names = []
    for task in tasks.iterdir() if tasks.is_dir() else []:
        with suppress(OSError):  # a thread that has ended since
            names.append((task / "comm").read_text())
    return "gloo_tcp_loop\n" in names


# CI tries the same examples every time; "thorough" as many others as one likes to wait for.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, stateful_step_count=25)
settings.register_profile("thorough", deadline=None, max_examples=2000, stateful_step_count=50)
settings.load_profile("ci")


# Markers by folder or file, relative to this one.
PLACES = {
    "engine/native": "compiler",
    "test_golden.py": "processes",
    "trainer/test_callbacks_ddp.py": "processes",
    "trainer/test_callbacks_resume.py": "slow",
    "engine/test_references.py": "slow",
    "diagnostics/test_callback.py": "slow",
    "diagnostics/local_entropy": "slow",
    "diagnostics/report": "slow",
    "diagnostics/test_groups_of_noise_and_valley.py": "slow",
}

# Markers by the test's name; slow is what takes seconds on an idle core. tests/test_lanes.py looks for each name.
NAMES = {
    "compiler": {
        "test_compiled_or_not_a_chain_of_float64_is_the_same",
    },
    "processes": {
        "test_a_failed_training_is_named_after_the_others_are_done",
        "test_computed_once_under_ddp",
        "test_computed_once_under_the_elastic_strategy",
        "test_ddp_is_sgd_with_as_many_batches_in_one",
        "test_equal_steps_cost_as_many_times_more_as_there_are_replicas",
        "test_every_config_of_the_language_model_takes_a_step",
        "test_every_config_takes_a_step",
        "test_every_method_spends_the_same_gradient_evaluations",
        "test_a_failure_ends_no_training",
        "test_killed_in_a_step_and_resumed",
        "test_replicas_that_diverge_are_a_result_that_no_rate_is_chosen_by",
        "test_the_readmes_language_models_take_a_step",
        "test_the_readmes_trainings_take_a_step",
        "test_training_is_the_same_with_and_without",
        "test_trainings_end_with_the_comparison",
        "test_two_processes_draw_different_images",
    },
    "slow": {
        "test_a_finder_in_a_later_epoch_leaves_no_trace",
        "test_a_loop_is_its_model",
        "test_a_page_prints_what_it_says",
        "test_a_resume_goes_on_as_if_it_had_not_been_closed",
        "test_every_callback_can_be_written_in_a_yaml_file",
        "test_every_flavour_of_checkpoint_has_x",
        "test_every_optimizer_takes_the_written_out_loop",
        "test_fit_then_resume_validate_test_and_predict_from_the_checkpoint",
        "test_going_on_from_a_file_is_exact_at_every_step",
        "test_heat_finds_the_minimum_of_the_smoothed_double_well",
        "test_last_is_the_last_epoch_and_best_the_best",
        "test_main_draws_the_picture_and_the_film",
        "test_modes_differ_and_train_mode_is_a_fixed_function",
        "test_near_zero_brackets_the_count",
        "test_reversible_path_in_many_dimensions_has_none_in_its_principal_planes",
        "test_swapping_in_a_validation_changes_nothing",
        "test_the_batch_size_finder",
        "test_the_optimal_cost_is_u",
        "test_trace_and_density_keep_their_error_bars",
    },
}

_started: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the markers that follow from where a test stands, what it is called, and its other markers."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            path, name = item.path.relative_to(here), getattr(item, "originalname", item.name)
            markers = {marker for place, marker in PLACES.items() if path.is_relative_to(place)}
            markers |= {marker for marker, names in NAMES.items() if name in names}
            for marker in markers:
                item.add_marker(marker)
        if item.get_closest_marker("processes"):
            item.add_marker("slow")
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _record(owner: Any, name: str, describe: Callable[..., str]) -> None:
    """Have a function note what it starts in ``_started``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def recording(*args: Any, **kwargs: Any) -> Any:
        started = describe(*args, **kwargs)
        if "json.dumps(sys.path)" not in started:  # jsonargparse's typeshed_client asks the interpreter once
            _started.append(started)
        return original(*args, **kwargs)

    setattr(owner, name, recording)


_record(os, "fork", lambda: "os.fork")
_record(subprocess.Popen, "__init__", lambda _, args, *rest, **kwargs: f"subprocess.Popen {args}")
_record(multiprocessing.process.BaseProcess, "start", lambda process: f"start of {process!r}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget what earlier tests started; fixtures of this one count."""
    _started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that starts a process and does not say so by a marker."""
    result = yield
    if _started and not any(map(item.get_closest_marker, ("processes", "compiler"))):
        pytest.fail(f"a test that starts a process must be marked processes (or compiler), started {_started[0]}")
    return result
