"""World generator: scenes per second and core at the default size, against loading the same scenes from disk as PNG.

    python benchmarks/bench_world.py
"""
import io
import time

import numpy as np
from PIL import Image

from freqseg.world.scenes import World, noise_bank


def rate(function, count: int = 200) -> float:
    "Calls per second of processor time."
    start = time.process_time()
    for index in range(count): function(index)
    return count/(time.process_time() - start)


def encoded(scene) -> bytes:
    "The scene's picture as PNG bytes."
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def main() -> None:
    world = World(0)
    noise_bank()
    drawing = rate(lambda index: world[index])
    files = [encoded(world[index]) for index in range(50)]
    loading = rate(lambda index: np.asarray(Image.open(io.BytesIO(files[index % 50]))))
    print(f"drawing {drawing:.0f} scenes/s per core at {world.size} pixels; reading them back from PNG {loading:.0f}/s; ratio {drawing/loading:.2f}")


def test_drawing(benchmark): assert benchmark(World(0).__getitem__, 5).image.shape == (224, 224, 3)


if __name__ == "__main__": main()
