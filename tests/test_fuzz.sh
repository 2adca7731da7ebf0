#!/bin/sh
# A short run of every fuzz target from its seeds; `make fuzz` is the long one.
exec "$(dirname "$0")/fuzz/fuzz.sh" 2
