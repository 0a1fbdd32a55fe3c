"""A small package with the names and signatures of HyperscaleES, written from the paper's formulas with `jax.random`.

`write_checkout` makes a directory of the checkout's shape. Its own ``__init__`` and that of its models raise, as they
would where their requirements are missing, and what is needed prints.
"""

from pathlib import Path

_BASE_NOISER = """
import jax, optax

print("loading the noisers")

class Noiser:
    @classmethod
    def init_noiser(cls, params, sigma, lr, *args, solver=None, solver_kwargs=None, group_size=0,
                    freeze_nonlora=False, noise_reuse=0, rank=1, use_batched_update=False, trust_region_norm=None):
        print("starting", cls.__name__)
        solver = (solver or optax.sgd)(lr, **(solver_kwargs or {}))
        frozen = dict(solver=solver, group=group_size, freeze=freeze_nonlora, reuse=noise_reuse, rank=rank,
                      norm=trust_region_norm)
        return frozen, {"sigma": sigma, "opt_state": solver.init(params)}

    @classmethod
    def do_mm(cls, frozen_noiser_params, noiser_params, param, base_key, iterinfo, x):
        return x @ param.T

    @classmethod
    def get_noisy_standard(cls, frozen_noiser_params, noiser_params, param, base_key, iterinfo):
        return param

    @classmethod
    def convert_fitnesses(cls, frozen_noiser_params, noiser_params, raw_scores, num_episodes_list=None):
        return raw_scores

    @classmethod
    def do_updates(cls, frozen_noiser_params, noiser_params, params, base_keys, fitnesses, iterinfos, es_map):
        return noiser_params, params
"""

_EGGROLL = """
import jax, jax.numpy as jnp, optax
from .base_noiser import Noiser
from ..models.common import MM_PARAM

class EggRoll(Noiser):
    @classmethod
    def _draw(cls, frozen, key, iterinfo):
        epoch, thread = iterinfo
        life = epoch // frozen["reuse"] if frozen["reuse"] else 0
        key = jax.random.fold_in(jax.random.fold_in(key, life), thread // 2)
        return key, jnp.where(thread % 2 == 0, 1.0, -1.0)

    @classmethod
    def _factors(cls, frozen, key, shape, dtype):
        both = jax.random.normal(key, (shape[0] + shape[1], frozen["rank"]), dtype)
        return both[shape[1]:] / SQRT(frozen["rank"]), both[:shape[1]]

    @classmethod
    def _matrix(cls, frozen, key, shape, dtype, update):
        A, B = cls._factors(frozen, key, shape, dtype)
        return A @ B.T

    @classmethod
    def do_mm(cls, frozen_noiser_params, noiser_params, param, base_key, iterinfo, x):
        jax.debug.print("a product")
        key, sign = cls._draw(frozen_noiser_params, base_key, iterinfo)
        noise = cls._matrix(frozen_noiser_params, key, param.shape, param.dtype, False)
        return x @ (param + sign * noiser_params["sigma"] * noise).T

    @classmethod
    def get_noisy_standard(cls, frozen_noiser_params, noiser_params, param, base_key, iterinfo):
        if frozen_noiser_params["freeze"]:
            return param
        key, sign = cls._draw(frozen_noiser_params, base_key, iterinfo)
        return param + sign * noiser_params["sigma"] * jax.random.normal(key, param.shape, param.dtype)

    @classmethod
    def convert_fitnesses(cls, frozen_noiser_params, noiser_params, raw_scores, num_episodes_list=None):
        groups = raw_scores.reshape(-1, frozen_noiser_params["group"] or len(raw_scores))
        centered = groups - groups.mean(axis=1, keepdims=True)
        return (centered / jnp.sqrt(jnp.var(raw_scores) + 1e-5)).reshape(-1)

    @classmethod
    def do_updates(cls, frozen_noiser_params, noiser_params, params, base_keys, fitnesses, iterinfos, es_map):
        frozen, members = frozen_noiser_params, len(fitnesses)

        def direction(param, base_key, kind):
            def noise(epoch, thread):
                key, sign = cls._draw(frozen, base_key, (epoch, thread))
                if kind == MM_PARAM:
                    return sign * cls._matrix(frozen, key, param.shape, param.dtype, True)
                return sign * jax.random.normal(key, param.shape, param.dtype)
            if kind != MM_PARAM and frozen["freeze"]:
                return jnp.zeros_like(param)
            total = jnp.tensordot(fitnesses, jax.vmap(noise)(*iterinfos), 1)
            return -jnp.sqrt(members) * noiser_params["sigma"] * total / members * cls._shrink(param, kind)

        gradient = jax.tree.map(direction, params, base_keys, es_map)
        if frozen["norm"]:
            gradient = optax.clip_by_global_norm(frozen["norm"]).update(gradient, optax.EmptyState())[0]
        updates, state = frozen["solver"].update(gradient, noiser_params["opt_state"], params)
        return {"sigma": noiser_params["sigma"], "opt_state": state}, optax.apply_updates(params, updates)

    @classmethod
    def _shrink(cls, param, kind):
        return 1.0
"""

_OPEN_ES = """
import jax
from .eggroll import EggRoll

class OpenES(EggRoll):
    @classmethod
    def _matrix(cls, frozen, key, shape, dtype, update):
        return jax.random.normal(key, shape, dtype)
"""

_BASELINE = """
import jax.numpy as jnp
from .eggroll import EggRoll

class EggRollBS(EggRoll):
    @classmethod
    def _draw(cls, frozen, key, iterinfo):
        key, sign = super()._draw(frozen, key, iterinfo)
        return key, sign * (iterinfo[1] % frozen["group"] >= 2)

    @classmethod
    def convert_fitnesses(cls, frozen_noiser_params, noiser_params, raw_scores, num_episodes_list=None):
        scores = raw_scores.reshape(-1, frozen_noiser_params["group"])
        advantage = (scores - scores[:, :1]) / (scores.std(axis=1, keepdims=True) + 1e-8)
        return jnp.where(jnp.arange(scores.shape[1]) >= 2, advantage, 0.0).mean(axis=0)
"""

_ALTEGGROLL = """
import jax.numpy as jnp
from .eggroll import EggRoll as Base

class EggRoll(Base):
    @classmethod
    def _matrix(cls, frozen, key, shape, dtype, update):
        A, B = cls._factors(frozen, key, shape, dtype)
        return jnp.sign(A) @ jnp.sign(B).T / jnp.sqrt(frozen["rank"]) if update else A @ B.T
"""

_SPARSE = """
import jax, jax.numpy as jnp
from .eggroll import EggRoll
from ..models.common import MM_PARAM

class Sparse(EggRoll):
    @classmethod
    def _matrix(cls, frozen, key, shape, dtype, update):
        places_key, values_key = jax.random.split(key)
        k = max(shape)
        places = (jax.random.uniform(places_key, (k,)) * (shape[0] * shape[1])).astype(jnp.int32)
        values = jax.random.normal(values_key, (k,), dtype)
        return jnp.zeros(shape[0] * shape[1], dtype).at[places].add(values).reshape(shape)

    @classmethod
    def _shrink(cls, param, kind):
        return max(param.shape) / param.size if kind == MM_PARAM else 1.0
"""

_COMMON = """
import jax, jax.numpy as jnp
from .base_model import Model

PARAM, MM_PARAM, EMB_PARAM, EXCLUDED = 0, 1, 2, 3

class MLP(Model):
    @classmethod
    def rand_init(cls, key, in_dim, out_dim, hidden_dims, use_bias, activation, dtype):
        dims = [in_dim, *hidden_dims, out_dim]
        params = {str(i): {"weight": jnp.zeros((b, a), dtype)} for i, (a, b) in enumerate(zip(dims, dims[1:]))}
        for layer in params.values():
            if use_bias:
                layer["bias"] = jnp.zeros(len(layer["weight"]), dtype)
        scan_map = jax.tree.map(lambda param: (), params)
        es_map = jax.tree.map(lambda param: MM_PARAM if param.ndim == 2 else PARAM, params)
        return {"activation": activation}, params, scan_map, es_map

def simple_es_tree_key(params, base_key, scan_map):
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, list(jax.random.split(base_key, len(leaves))))
"""

_FILES = {
    "__init__.py": "print('hello')\nraise ImportError('gymnax is not installed')\n",
    "noiser/base_noiser.py": _BASE_NOISER,
    "noiser/eggroll.py": _EGGROLL,
    "noiser/open_es.py": _OPEN_ES,
    "noiser/eggroll_baseline_subtraction.py": _BASELINE,
    "noiser/alteggroll.py": _ALTEGGROLL,
    "noiser/sparse.py": _SPARSE,
    "noiser/__init__.py": """
from . import alteggroll, base_noiser, eggroll, eggroll_baseline_subtraction, open_es, sparse

all_noisers = {
    "noop": base_noiser.Noiser, "open_es": open_es.OpenES, "eggroll": eggroll.EggRoll,
    "eggrollbs": eggroll_baseline_subtraction.EggRollBS, "alteggroll": alteggroll.EggRoll,
    "reeggroll": eggroll.EggRoll, "sparse": sparse.Sparse,
}
""",
    "models/__init__.py": "raise ImportError('transformers is not installed')\n",
    "models/base_model.py": "print('loading the models')\n\n\nclass Model:\n    pass\n",
    "models/common.py": _COMMON,
}


def write_checkout(directory: Path, square_root: str = "jnp.sqrt") -> Path:
    """Writes the package to ``directory/src/hyperscalees``, with `square_root` in the scale of the factors."""
    for name, source in _FILES.items():
        path = directory / "src" / "hyperscalees" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.replace("SQRT", square_root))
    return directory
