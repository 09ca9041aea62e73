"""Compares the instructions that gungraun counted with those expected, line by line."""

import json
import pathlib
import sys

MOST_OVER = 0.05


def counted(path):
    counts = {}
    for line in pathlib.Path(path).read_text().splitlines():
        part = json.loads(line)
        name = ".".join(filter(None, [part["function_name"], part.get("id")]))
        [profile] = part["profiles"]
        counts[name] = profile["data"]["total"]["metrics"]["Ir"]["values"]["new"]
    return counts


def expected(path):
    lines = pathlib.Path(path).read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {name: int(count) for name, count in pairs}


def main(expected_file, *arguments):
    counted_files = [counted(path) for path in arguments if path != "--write"]
    # What another thread did meanwhile is counted too: the least is the part's own.
    counts = {name: min(counts[name] for counts in counted_files) for name in counted_files[0]}
    if "--write" in arguments:
        lines = [f"{name} {count}\n" for name, count in counts.items()]
        heading = "# Instructions of each part, as `tests/instructions/run --write` counted them.\n"
        pathlib.Path(expected_file).write_text(heading + "".join(lines))
    before = expected(expected_file)
    wrong = [f"{name} was not counted" for name in before.keys() - counts.keys()]
    for name, count in counts.items():
        if name not in before:
            wrong.append(f"{name} is not in {expected_file}")
            continue
        change = count / before[name] - 1
        print(f"{name:45} {count:>10} {change:+8.1%}")
        if change > MOST_OVER:
            wrong.append(f"{name} takes {change:.1%} more instructions than expected")
    print(f"{len(counts)} parts counted, {len(wrong)} wrong")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
