"""Cut a model as a plan says, and check the result before handing it over."""

from __future__ import annotations

from torch import Tensor, nn

from pruner_lib.pruning.attributes import Assignment, apply_assignment, find_assignment
from pruner_lib.pruning.compensation import Compensation
from pruner_lib.pruning.compensation import compensate as fit_readers
from pruner_lib.pruning.compensation.compensate import as_settings
from pruner_lib.pruning.configuration import Blueprint, find_blueprint, follow_blueprint, shapes_of
from pruner_lib.pruning.dropping import drop_in_place
from pruner_lib.pruning.errors import PruningError
from pruner_lib.pruning.expert_widths import warn_of_expert_widths
from pruner_lib.pruning.in_turn import kinds_in_turn, prune_in_turn
from pruner_lib.pruning.plan import PruningPlan
from pruner_lib.pruning.ratios import profiles
from pruner_lib.pruning.slicing import meta_copy, sliced_copy, sliced_meta_copy
from pruner_lib.pruning.verification import changed_numbers, find_difference


def prune(
    model: nn.Module, plan: PruningPlan, *, compensate: Compensation | Tensor | None = None
) -> nn.Module:
    """Remove the groups that a plan names and return the smaller model.

    Every coupled slice is cut out of its parameter or buffer: with groups R of a family removed,
    ``new = old.index_select(dim, all indices not in R)``. The logits equal those of the full model
    with the same groups zeroed, up to rounding. Sizes kept outside the weights (head counts, split
    sizes, the configuration) follow; the softmax scale stays.

    The cut checks itself: discovery on the cut model, without values, must find the family sizes
    that the plan promises, or the cut is refused. It warns once of experts at a width that torch's grouped
    matrix product, in which transformers runs them by default, cannot run.

    Args:
        model: left bit for bit as it is; meta models are fine.
        plan: made for this model.
        compensate: calibration token ids ``[N, L]``, or :class:`Compensation` with more to say: what reads
            the removed channels is then fitted again in closed form, see :func:`compensate`.

    Returns:
        A new model, ordinary in every way: it generates with a cache, trains, takes adapters.

    Raises:
        TypeError: no plan, or something else to compensate with.
        PruningError: the plan is for another model, or no way was found to make the model's code
            run at the new sizes.

    Example:
        >>> plan = PruningPlan.from_removal(discover(model), {"layers.0.mlp_neuron": [3, 7]})
        >>> prune(model, plan).model.layers[0].mlp.down_proj.in_features  # 48 - 2
        46
    """
    _check_same_model(model, plan)
    settings = None if compensate is None else as_settings(compensate)
    pruned = _cut(model, plan.width, tuple(plan.dropped_modules.values()))
    warn_of_expert_widths(model, plan)
    if plan.dropped:
        pruned = drop_in_place(pruned, plan.dropped_modules)
    return pruned if settings is None else fit_readers(model, pruned, plan, settings).model


def _cut(model: nn.Module, plan: PruningPlan, spared: tuple[str, ...] = ()) -> nn.Module:
    """The model without the groups of a plan; ``spared`` as for :func:`sliced_copy`."""
    if not plan.removal:
        return sliced_copy(model, plan, spared)
    empty = sliced_meta_copy(model, plan)

    def describes(dense: Blueprint, cut: Blueprint) -> bool:
        trial = meta_copy(empty)
        follow_blueprint(trial, dense.model, cut.model)
        return find_difference(trial, plan) is None

    blueprints = find_blueprint(model, plan, shapes_of(empty), describes)
    if blueprints is not None:
        pruned = sliced_copy(model, plan, spared)
        follow_blueprint(pruned, *(blueprint.model for blueprint in blueprints))
        return pruned
    if len(kinds_in_turn(plan)) > 1:  # on a model without values, so that no step's weights are held
        described = prune_in_turn(meta_copy(model), plan, _cut)
        return sliced_copy(model, plan, spared, described)
    num_layers = plan.dependencies.num_layers
    assignment = _search_attributes(model, plan)
    pruned = sliced_copy(model, plan, spared)
    apply_assignment(pruned, assignment, num_layers)
    return pruned


def _check_same_model(model: nn.Module, plan: PruningPlan) -> None:
    if not isinstance(plan, PruningPlan):
        raise TypeError(
            f"prune wants a PruningPlan (plan_pruning, PruningPlan.from_removal), not a {type(plan).__name__}"
        )
    shapes = shapes_of(model)
    unknown = [name for name, _ in model.named_parameters() if name not in plan.dependencies.shapes]
    if unknown:
        raise PruningError(
            f"the plan is for another model: it knows no {unknown[0]}, which this model has; call discover "
            "and plan_pruning on the model that is cut"
        )
    optional = {*plan.dependencies.aliases, *plan.dependencies.buffers} - set(plan.parameters)
    for parameter, expected in plan.dependencies.shapes.items():
        if shapes.get(parameter, expected) != tuple(expected) or (
            parameter not in shapes and parameter not in optional
        ):
            found = shapes.get(parameter, "no such parameter")
            raise PruningError(
                f"the plan is for another model: it expects {parameter} of shape {tuple(expected)}, "
                f"this model has {found}; call discover and plan_pruning on the model that is cut"
            )


def _check_as_discovered(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a model whose code does something else, uncut, than when it was discovered."""
    changed = changed_numbers(meta_copy(model), plan.dependencies)
    if changed is not None:
        raise PruningError(
            f"this {type(model).__name__} no longer is what discover saw, even uncut: {changed}. Another "
            "attention implementation does that, for one. Call discover and plan_pruning again; scores of "
            "families that are still there may be used. The model is unchanged"
        )


def _search_attributes(model: nn.Module, plan: PruningPlan) -> Assignment:
    """Numbers on the modules that must change, or a refusal."""
    num_layers = plan.dependencies.num_layers
    empty = sliced_meta_copy(model, plan)
    reasons: list[str] = []

    def confirm(assignment: Assignment) -> bool:
        trial = meta_copy(empty)
        apply_assignment(trial, assignment, num_layers)
        problem = find_difference(trial, plan)
        if problem is not None:
            reasons.append(problem)
        return problem is None

    assignment = find_assignment(empty, profiles(plan, num_layers), num_layers, confirm)
    if assignment is None:
        _check_as_discovered(model, plan)
        kinds = sorted({plan.dependencies.family(name).kind for name in plan.removal})
        raise PruningError(
            f"cannot cut {', '.join(kinds)} of {type(model).__name__}: its code keeps sizes that did not "
            f"follow. Tried {len(reasons)} ways to set them; with none set: {reasons[0]}. Cut other "
            "families, or the same share of them in every layer. The model is unchanged"
        )
    return assignment
