"""What lies left of, right of, above or below what, where people would agree."""

from collections import Counter

from scripts.demo_model.scene import Box, Scene

DIRECTIONS = ("left", "right", "above", "below")


def lies(other: Box, direction: str, reference: Box, short: int) -> bool | None:
    """Whether `other` lies in `direction` of `reference`; None where people may disagree.

    `along` and `across` are the distances of the centres in the direction and across it. Yes: the
    boxes do not overlap in the direction, along >= short / 10 and along >= 1.25 across (within 39
    degrees of the axis). No: along <= across / 2 (at least 63 degrees away), unless the boxes do
    not overlap in the direction but do across it.

    Args:
        short: the image's shorter side in pixels.
    """
    axis, sense = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[direction]
    cross = 1 - axis
    along = sense * (other[axis] + other[axis + 2] - reference[axis] - reference[axis + 2]) / 2
    across = abs(other[cross] + other[cross + 2] - reference[cross] - reference[cross + 2]) / 2
    near, far = (other, reference) if sense > 0 else (reference, other)
    apart = near[axis] >= far[axis + 2]
    if apart and along >= 0.1 * short and along >= 1.25 * across:
        return True
    facing = other[cross] < reference[cross + 2] and reference[cross] < other[cross + 2]
    if along <= across / 2 and not (apart and facing):
        return False
    return None


def places(scene: Scene) -> list[tuple[str, str, str]]:
    """All (reference, direction, answer) that a question on places may use.

    The reference has a unique name (`red star`, also `star` if it is the only star, or `sign`);
    the answer is the only thing that lies in the direction, or `nothing`. Disputable cases are
    left out: where `lies` is None for anything, or true for two things.
    """
    things = [(shape.name, shape.box) for shape in scene.shapes]
    if scene.sign is not None:
        things.append(("sign", scene.sign.box))
    names = Counter(name for name, _ in things)
    kinds = Counter(shape.kind for shape in scene.shapes)
    found = []
    for i, (name, box) in enumerate(things):
        if names[name] > 1:
            continue
        others = things[:i] + things[i + 1 :]
        references = [name]
        if name != "sign" and kinds[kind := name.split()[1]] == 1:
            references.append(kind)
        for direction in DIRECTIONS:
            results = [lies(other, direction, box, scene.short) for _, other in others]
            there = [other for (other, _), yes in zip(others, results, strict=True) if yes]
            if None in results or len(there) > 1 or not others:
                continue
            answer = there[0] if there else "nothing"
            found += [(reference, direction, answer) for reference in references]
    return found
