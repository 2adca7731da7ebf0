"""Reads a configuration of ./train."""


def read_config(path):
    """`key = value` lines; what `include = other.cfg` sets is overridden by the file itself."""
    keys, included = {}, {}
    for line in path.read_text().splitlines():
        key, equals, value = (part.strip() for part in line.partition("#")[0].partition("="))
        if equals and key == "include":
            included = read_config(path.parent / value)
        elif equals:
            keys[key] = value
    return {**included, **keys}
