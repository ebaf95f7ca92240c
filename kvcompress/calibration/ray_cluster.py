"""A Ray cluster: connecting to it, waking its workers. No torch, so that a command does both before it imports it."""

from __future__ import annotations

from typing import Any

from kvcompress.errors import OptionError


def on_gpu(per_gpu: int) -> dict[str, Any]:
    """Return how a task is asked for that has a GPU, which `per_gpu` of them share.

    Else Ray ends a worker after one such task, and what it imported is lost (max_calls), and shows it that GPU alone,
    where workers are used again for tasks that are given another one.
    """
    seen = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    return {"num_gpus": 1 / per_gpu, "max_calls": 0, "runtime_env": seen}


def connected(address: str) -> Any:
    """Return the package ray, connected. Raises OptionError where it is not installed or there is no cluster."""
    try:
        import ray
    except ImportError as error:
        raise OptionError("--ray needs the package ray: pip install 'kvcompress[ray]'.") from error
    if not ray.is_initialized():
        try:
            ray.init(None if address == "local" else address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OptionError(
                f"no Ray cluster answers at '{address}' ({reason}). Start one (ray start --head), or use --ray local."
            ) from error
    return ray


def wake(address: str, per_gpu: int = 1) -> None:
    """Let `per_gpu` workers for each GPU import what tasks need, while this process does the same.

    It does not wait for them. Raises OptionError as `connected`.
    """
    ray = connected(address)
    task = ray.remote(max_retries=0, **on_gpu(per_gpu))(_import)
    for _ in range(per_gpu * int(ray.cluster_resources().get("GPU", 0))):
        task.remote()


def _import() -> None:
    import kvcompress.calibration.ray_tasks  # noqa: F401
