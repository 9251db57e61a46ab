"""llm-compressor's model_free_ptq, which quantizes a checkpoint without its model. For scripts/bench.

    model_free_ptq.py SOURCE DESTINATION SCHEME WORKERS

Prints how long it took without the imports.
"""

import sys
import time

from llmcompressor import model_free_ptq
from loguru import logger


def main(source: str, destination: str, scheme: str, workers: str) -> None:
    """Quantizes every tensor on the CPU."""
    logger.remove()
    start = time.perf_counter()
    model_free_ptq(source, destination, scheme=scheme, device="cpu", max_workers=int(workers))
    print(f"seconds without imports: {time.perf_counter() - start:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
