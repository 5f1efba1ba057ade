"""Speed and memory of a model and its teacher in vLLM's engine, in the rows of `lolcats.evaluation.speed`."""

from lolcats.serving.vllm_bench.jobs import Job, find_jobs
from lolcats.serving.vllm_bench.run import ENGINE, check_vllm, measure_engine

__all__ = ["ENGINE", "Job", "check_vllm", "find_jobs", "measure_engine"]
