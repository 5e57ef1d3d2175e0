"""MethodTuner, the tuner of methods that are not yet a `Method`; see petl/core/method.py."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from accelerate import init_empty_weights
from torch import nn

from petl.core.layers.block import check_block_adapter_name, refuse_own_forward
from petl.core.layers.context import InputCapture
from petl.core.layers.layer import Adapter, LayerInfo, LayerShape
from petl.core.method import Method, Target, WrapContext, linear_target
from petl.core.model.targets import matched_names, resolve_blocks, resolve_targets
from petl.core.spec.checks import check_adapter_name, check_tensor_names
from petl.core.spec.config import MethodConfig
from petl.core.support import Lacks, without_lora
from petl.core.tuners.adapter import AdapterTuner
from petl.core.tuners.asking import AskingTuner

FACTS = (
    *("adapter_cls", "lacks", "needs_tuner", "free_dims", "optional_tensors"),
    *("by_position", "capture_cls"),
)
# hooks that are looked for by name: those of a tuner, and of a method
CHANGED = {"update_and_allocate": "after_step", "training_state": "state"}


class MethodTuner(AdapterTuner):
    """Tuner that a method derives from, in the form that `Method` replaces."""

    config_cls: ClassVar[type[MethodConfig]]
    adapter_cls: ClassVar[type[Adapter]]
    lacks: ClassVar[Lacks] = {}
    needs_tuner: ClassVar[str] = ""
    free_dims: ClassVar[Mapping[str, int]] = {}
    optional_tensors: ClassVar[tuple[str, ...]] = ()
    by_position: ClassVar[bool] = False
    capture_cls: ClassVar[type[InputCapture]] = InputCapture

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        facts = {name: getattr(cls, name, None) for name in FACTS}
        for name, hook in CHANGED.items():
            if getattr(cls, name) is not getattr(AskingTuner, name):
                facts[hook] = None
        if "method" not in vars(cls):
            cls.method = Method(**facts)

    # Methods to override

    def choose_targets(self, config: Any, model: nn.Module) -> None:
        """Set `config.target_modules` to names that match modules of `model`."""
        # PEFT's default, for which it has a table of models
        if config.target_modules is None:
            config.target_modules = "all-linear"
        # PEFT's word; here it leaves out layers outside of blocks
        resolve_targets(config, model, words=("all-linear",))

    def layer_settings(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> dict[str, dict[str, Any]]:
        """Return, by module path, `LayerInfo.settings`: what an adapter needs besides its shape.

        Called once per adapter, before anything is changed, so a method refuses targets that it
        cannot adapt here, with an InputError.
        """
        return {}

    def whole_modules(self, config: Any, model: nn.Module) -> Mapping[str, int]:
        """Return the paths and widths of modules that are adapted as a unit, not as linear layers.

        Such a module maps one tensor to one tensor of the same width, and its adapter gets both.
        """
        return {}

    def block_modules(self, config: Any, model: nn.Module) -> Mapping[str, int | LayerShape]:
        """Return the paths and widths of the blocks that are adapted as a whole if targeted.

        Their adapters get the block's first input and first output, and in `with_base` all of its
        arguments; see `BlockAdapters`. Such a block cannot be merged. One number: the width of both
        input and output.
        """
        return {}

    def sources(
        self, config: Any, model: nn.Module, shapes: Mapping[str, LayerShape]
    ) -> Mapping[str, str]:
        """Return, by module path, the module whose first input its adapter gets as `x`.

        Adapters of other paths get the input of their own layer. Both modules must run in the same
        call of their block, the source first, so that checkpointing recomputes them together.
        Called before anything is changed, as `layer_settings` is.
        """
        return {}

    def make_shared(self, config: Any, shapes: Mapping[str, LayerShape]) -> nn.Module | None:
        """Return the tensors that all layers of one adapter share, as a flat module, or None."""
        return None

    def _prepare(self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        config: Any = self.peft_config[adapter_name]
        resolve_blocks(config, model)
        self.choose_targets(config, model)
        blocks = self.block_modules(config, model)
        widths = {**self.whole_modules(config, model), **blocks}
        c = WrapContext(model, config, adapter_name)
        for key in matched_names(config, model):
            width = widths.get(key)
            if width is None:
                c.targets[key] = linear_target(c, key)
            else:
                shape = width if isinstance(width, LayerShape) else LayerShape(width, width)
                c.targets[key] = Target(key, shape, is_block=key in blocks)
        shapes = c.shapes
        for key in blocks.keys() & shapes.keys():
            check_block_adapter_name(adapter_name)
            refuse_own_forward(model.get_submodule(key), key)
        config.check_shapes(shapes)
        settings = self.layer_settings(config, model, shapes)
        for key, source in self.sources(config, model, shapes).items():
            has = c.targets[key]
            c.targets[key] = Target(key, has.shape, source, has.is_block)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            pool = self.make_shared(config, shapes)
        if pool is not None:
            self.refuse_without_tuner("its layers share tensors, which the tuner has")
            check_adapter_name(adapter_name, model, type(self))
            check_tensor_names(adapter_name, pool)
            self.shared[adapter_name] = pool
        no_lora, self._wrapping = without_lora(self.method.lacks, config), c
        self._infos = {
            key: LayerInfo(key, adapter_name, self.context, pool, settings.get(key, {}), no_lora)
            for key in shapes
        }
