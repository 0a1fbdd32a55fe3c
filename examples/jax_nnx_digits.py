"""Train a Flax nnx classifier on the digits of scikit-learn from its cross-entropy, without a gradient of it.

    python examples/jax_nnx_digits.py

`es_value_and_grad` stands where `nnx.value_and_grad` would: `nnx.Optimizer` takes the step.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from eggroll import EggrollConfig
from eggroll.jax import es_value_and_grad


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def main(generations: int = 300, population_size: int = 256) -> float:
    images, labels = load_digits(return_X_y=True)
    data = train_test_split(images.astype(np.float32) / 16, labels, test_size=0.25, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, data)

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)
    graph = nnx.graphdef(model)

    def loss(params, x, y):
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    config = EggrollConfig(population_size=population_size, sigma=0.05)
    value_and_grad = es_value_and_grad(loss, config, maximize=False)

    @nnx.jit
    def step(model, optimizer, generation):
        rows = jax.random.choice(jax.random.fold_in(jax.random.key(1), generation), len(train_x), (256,))
        value, grads = value_and_grad(
            nnx.state(model, nnx.Param), jax.random.key(0), generation, train_x[rows], train_y[rows]
        )
        optimizer.update(model, grads)
        return value

    @nnx.jit
    def accuracy(model):
        return jnp.mean(model(test_x).argmax(-1) == test_y)

    for generation in range(generations):
        value = step(model, optimizer, jnp.asarray(generation))
        if generation % 50 == 0 or generation == generations - 1:
            print(f"generation {generation:4d}  loss {value:.3f}  test accuracy {accuracy(model):.3f}")
    return float(accuracy(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--population-size", type=int, default=256, help="members (default: %(default)s)")
    options = parser.parse_args()
    main(options.generations, options.population_size)
