"""Names with their numbers left open: `*` for those of layers and experts, themselves where what a tensor becomes depends on them."""

import re
from itertools import combinations

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")

# Of a list with more entries than this that each become something else, more aren't written out: they are layers.
MOST_LITERALS = 8


def opened(name, literal=()):
    """The name with `*` for its numbers, but those at the places `literal`, counted from 0."""
    places = iter(range(len(name)))
    return NUMBER.sub(lambda number: number[0] if next(places) in literal else "*", name)


def rows(names):
    """`names`: the modules that each belongs to, by name. Tuples (pattern, names of that pattern, patterns of their modules).

    Each `*` of a module's pattern is the number at the pattern's `*` of the same place.
    """
    alike = {}
    for name in names:
        alike.setdefault(opened(name), []).append(name)
    return [row for group in alike.values() for row in rows_of({name: names[name] for name in group})]


def rows_of(group):
    """The same of names that differ by their numbers only: the fewest rows that say of each name what it becomes."""
    count = len(NUMBER.findall(next(iter(group))))
    if modules := module_patterns(group, ()):
        return [(opened(next(iter(group))), list(group), modules)]
    best = None
    for literal in (chosen for size in range(1, count + 1) for chosen in combinations(reversed(range(count)), size)):
        parts = {}
        for name, modules in group.items():
            parts.setdefault(opened(name, literal), {})[name] = modules
        found = [(pattern, list(part), module_patterns(part, literal)) for pattern, part in parts.items()]
        if all(modules is not None for *_, modules in found) and (best is None or len(found) < len(best)):
            best = found
    if best is None or len(best) > MOST_LITERALS:
        return [(opened(next(iter(group))), list(group), any_of(group))]
    return best


def module_patterns(part, literal):
    """The patterns that give each name's modules; None if there are none."""
    numbers = {name: open_numbers(name, literal) for name in part}
    # Numbers of the last are the least alike.
    last = list(part)[-1]
    patterns = {pattern_of(module, numbers[last]) for module in part[last]}
    fits = all({filled(pattern, numbers[name]) for pattern in patterns} == set(modules) for name, modules in part.items())
    return sorted(patterns) if fits else None


def any_of(group):
    """Those of all, where each becomes something else."""
    return sorted({pattern_of(module, open_numbers(name)) for name, modules in group.items() for module in modules})


def open_numbers(name, literal=()):
    return [number for place, number in enumerate(NUMBER.findall(name)) if place not in literal]


def pattern_of(module, numbers):
    """A module's name with `*` for those of its numbers that are the next of `numbers`."""
    rest = list(numbers)
    return NUMBER.sub(lambda number: rest.pop(0) and "*" if rest and rest[0] == number[0] else number[0], module)


def filled(pattern, numbers):
    rest = iter(numbers)
    return re.sub(r"\*", lambda _: next(rest, "?"), pattern)
