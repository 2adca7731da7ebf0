# make            train and analyze            make test       everything that is tested
# make demo       the main job, small          make check      formatting, warnings, static analysis
# make bench      speed on rtx4060.cfg         make mutants    that the tests notice broken code
# make reference  fixtures anew from PyTorch   make sanitize   the tests under the sanitizers
# make pairs      the quick pair, three seeds  make table4     Table 4 in small
# make help       this list

CC ?= cc
OPT ?= -O3 -march=native -ffp-contract=fast
WARN = -Wall -Wextra -Wpedantic -Wshadow -Werror
CFLAGS ?= $(OPT)
ALL_CFLAGS = -std=c11 $(WARN) $(CFLAGS) $(OPENMP) $(STB)
LDLIBS = -lm
HEADERS = gated_attention.h gated_attention_x86.h $(wildcard data/*.h)
BUILD = build

# What is here: OpenMP by trying it, stb_ds by its header. OPENMP= on the command line builds without threads.
try = $(shell printf '$(1)' | $(CC) $(2) -x c - -o /dev/null 2>/dev/null && echo yes)
hash := \#
ifeq ($(origin OPENMP),undefined)
OPENMP := $(if $(call try,$(hash)include <omp.h>\nint main(void){return omp_get_max_threads()<1;}\n,-fopenmp),-fopenmp)
endif
NVCC := $(shell command -v nvcc 2>/dev/null)
MPICC := $(shell command -v mpicc 2>/dev/null)

.PHONY: all help packages packages-test test demo check format bench mutants reference sanitize pairs table4 clean
all: train analyze
	@echo "compiler: $(CC)   OpenMP: $(or $(OPENMP),not found, one thread)   nvcc: $(or $(NVCC),not found)   MPI: $(or $(MPICC),not found)   (this version computes on the CPU)"

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Installs what is missing and says which: `run` what the programs need, `test` what the tests need as well.
packages:
	@sh .ci/packages run
packages-test:
	@sh .ci/packages test

train: train.c $(HEADERS) | packages
	$(CC) $(ALL_CFLAGS) train.c -o $@ $(LDLIBS)
analyze: analyze.c $(HEADERS) | packages
	$(CC) $(ALL_CFLAGS) analyze.c -o $@ $(LDLIBS)

# ---- the main job, small: both quick models, then the report -------------------------------------------------------
DEMO ?= demo
DEMO_ARGS ?=
demo: train analyze
	@sh tests/demo.sh $(DEMO) $(DEMO_ARGS)
pairs: train analyze
	@tests/pairs.sh
table4: train analyze
	@tests/table4.sh

# ---- tests ---------------------------------------------------------------------------------------------------------
C_TESTS = gradients operators fixtures model checkpoint data x86 amx
SH_TESTS = header train analyze readme isa
TEST_CFLAGS = -std=c11 $(WARN) $(CFLAGS) $(OPENMP) -I. -Itests
TEST_HEADERS = $(HEADERS) $(wildcard tests/*.h)

$(BUILD)/test_%: tests/test_%.c $(TEST_HEADERS) | packages-test
	@mkdir -p $(BUILD)
	$(CC) $(TEST_CFLAGS) $< -o $@ -lcmocka -lpthread $(LDLIBS)

test: packages-test train analyze $(C_TESTS:%=$(BUILD)/test_%)
	@sh tests/run.sh $(C_TESTS:%=$(BUILD)/test_%) $(SH_TESTS:%=tests/test_%.sh) tests/sanitize.sh tests/mutants.sh

sanitize: packages-test
	@sh tests/sanitize.sh
mutants: packages-test
	@sh tests/mutants.sh
reference:
	@tests/reference/setup.sh && .venv/bin/python tests/reference/make_fixtures.py
$(BUILD)/bench/%: tests/bench/%.c $(HEADERS)
	@mkdir -p $(BUILD)/bench
	$(CC) $(TEST_CFLAGS) $< -o $@ $(LDLIBS)
BENCH ?=
bench: train
	@sh tests/bench/bench.sh $(BENCH)

# ---- formatting and static analysis --------------------------------------------------------------------------------
SOURCES = gated_attention.h train.c analyze.c $(wildcard data/*.h tests/*.c tests/*.h tests/*.cpp)
format:
	clang-format -i $(SOURCES)
check: packages-test
	@sh tests/check.sh $(SOURCES)

clean:
	rm -rf train analyze $(BUILD) $(DEMO)
