# make            train and analyze            make test       everything that is tested
# make demo       the main job, small          make check      formatting, warnings, static analysis
# make bench      speed on rtx4060.cfg         make mutants    that the tests notice broken code
# make reference  fixtures anew from PyTorch   make sanitize   the tests under the sanitizers
# make pairs      the quick pair, three seeds  make table4     Table 4 in small
# make curves     loss with float32 and with bfloat16 products (an hour)
# make sweep      stability at rising rates    make late-gate  a gate added to a trained model (A.7)
# make fuzz       every parser, FUZZ_SECONDS each (600)
# make lengths    longer contexts (4.4)
# make test-cuda  the GPU that is here, tested make bench-cuda and its speed beside PyTorch
# make format     clang-format                 make clean      without what was built
# make packages   what is missing, installed   make help       this list

CC ?= cc
OPT ?= -O3 -march=native -ffp-contract=fast
# WERROR=-Werror where the compiler is known (.ci/run): a newer one may warn of more, and should still build.
WERROR ?=
WARN = -Wall -Wextra -Wpedantic -Wshadow $(WERROR)
CFLAGS ?= $(OPT)
ALL_CFLAGS = -std=c11 $(WARN) $(CFLAGS) $(OPENMP) $(TEXT)
LDLIBS = $(TEXT_LIBS) -lm
HEADERS = gated_attention.h gated_attention_x86.h gated_attention_cuda.cuh $(wildcard data/*.h drivers/*.h drivers/*/*.h)
BUILD = build

# Where Homebrew keeps what it installs, Apple's compiler does not look by itself.
BREW := $(shell brew --prefix 2>/dev/null)
ifneq ($(BREW),)
export CPATH := $(BREW)/include$(if $(CPATH),:$(CPATH))
export LIBRARY_PATH := $(BREW)/lib$(if $(LIBRARY_PATH),:$(LIBRARY_PATH))
endif
# What is here: OpenMP by trying it. OPENMP= on the command line builds without threads.
try = $(shell printf '$(1)' | $(CC) $(2) -x c - -o /dev/null $(3) 2>/dev/null && echo yes)
hash := \#
ifeq ($(origin OPENMP),undefined)
OPENMP := $(if $(call try,$(hash)include <omp.h>\nint main(void){return omp_get_max_threads()<1;}\n,-fopenmp),-fopenmp)
endif
# Tokenizers need PCRE2 and utf8proc; PCRE2= UTF8PROC= builds without. Looked for when they are used: `packages` may just
# have installed them.
PCRE2 = $(call try,$(hash)define PCRE2_CODE_UNIT_WIDTH 8\n$(hash)include <pcre2.h>\nint main(void){return !&pcre2_code_free;}\n,,-lpcre2-8)
UTF8PROC = $(call try,$(hash)include <utf8proc.h>\nint main(void){return !utf8proc_version();}\n,,-lutf8proc)
TEXT = $(if $(PCRE2),-DDATA_PCRE2) $(if $(UTF8PROC),-DDATA_UTF8PROC)
TEXT_LIBS = $(if $(PCRE2),-lpcre2-8) $(if $(UTF8PROC),-lutf8proc)
NVCC := $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
MPICC := $(shell command -v mpicc 2>/dev/null || ls /usr/lib64/openmpi/bin/mpicc 2>/dev/null)
comma := ,
CUDA_HOME ?= $(if $(NVCC),$(patsubst %/bin/nvcc,%,$(realpath $(NVCC))),$(firstword $(wildcard /usr/local/cuda /opt/cuda)))
CUDA_LIB = $(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/targets/x86_64-linux/lib /usr/lib/x86_64-linux-gnu))
CUDA_LIBRARY := $(if $(NVCC),$(BUILD)/cuda/libgated_attention_cuda.so)
# Several GPUs need NCCL's header now, and its library when they are used.
CUDA_NCCL = $(if $(wildcard $(CUDA_HOME)/include/nccl.h /usr/include/nccl.h),-DGA_NCCL)
CUDA_CFLAGS = $(if $(NVCC),-DGA_CUDA_LIBRARY='"$(notdir $(CUDA_LIBRARY))"')
MPI_LIBRARY := $(if $(MPICC),$(BUILD)/mpi/libranks_mpi.so)
MPI_CFLAGS = $(if $(MPICC),-DGA_MPI_LIBRARY='"$(notdir $(MPI_LIBRARY))"')
MPI_LIBS = $(if $(MPICC),-Wl$(comma)-rpath$(comma)'$$ORIGIN/$(dir $(MPI_LIBRARY))' -ldl)
CUDA_LIBS = $(if $(NVCC),-rdynamic -Wl$(comma)-rpath$(comma)'$$ORIGIN/$(dir $(CUDA_LIBRARY))' -ldl)

.PHONY: all help packages packages-test programs-test test test-cuda demo check format bench bench-cuda mutants fuzz reference sanitize
.PHONY: pairs table4 curves sweep late-gate lengths clean
all: train analyze data/vocabulary
	@echo "compiler: $(CC)   OpenMP: $(or $(OPENMP),not found, one thread)   tokenizers: $(or $(and $(PCRE2),$(UTF8PROC)),PCRE2 or utf8proc not found)   nvcc: $(or $(NVCC),not found, no GPU)   MPI: $(or $(MPICC),not found)"

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Installs what is missing and says which: `run` what the programs need, `test` what the tests need as well.
packages:
	@sh .ci/packages run
packages-test:
	@sh .ci/packages test

train: train.c $(HEADERS) | packages $(CUDA_LIBRARY) $(MPI_LIBRARY)
	$(CC) $(ALL_CFLAGS) $(CUDA_CFLAGS) $(MPI_CFLAGS) train.c -o $@ $(CUDA_LIBS) $(MPI_LIBS) $(LDLIBS)
analyze: analyze.c $(HEADERS) | packages $(CUDA_LIBRARY)
	$(CC) $(ALL_CFLAGS) $(CUDA_CFLAGS) analyze.c -o $@ $(CUDA_LIBS) $(LDLIBS)
data/vocabulary: data/vocabulary.c $(HEADERS) | packages
	$(CC) $(ALL_CFLAGS) data/vocabulary.c -o $@ $(LDLIBS)

# Ranks over MPI, which train loads where a launcher has started several. MPICC= on the command line builds without.
$(BUILD)/mpi/libranks_mpi.so: drivers/train/ranks_mpi.c drivers/train/ranks_mpi.h $(BUILD)/cuda/declarations
	@mkdir -p $(BUILD)/mpi
	$(MPICC) -std=c11 $(WARN) $(CFLAGS) -fPIC -shared $< -o $@ -lpthread -lm

# The companion for NVIDIA GPUs, which the programs load where there is a driver: for the GPU that is here, else for all
# from compute capability 7.5 on (compiled by the driver when the program starts, but for 8.x). NVCC= on the command line
# builds without. It is compiled again when its own text, the declarations of gated_attention.h or the GPU change.
# CUDNN=1: attention by cuDNN where it takes a shape, through its header-only frontend (pip install nvidia-cudnn-frontend).
CUDNN ?=
CUDNN_FRONTEND ?= $(patsubst %/cudnn_frontend.h,%,$(firstword $(wildcard $(CUDA_HOME)/include/cudnn_frontend.h \
	/usr/include/cudnn_frontend.h /usr/local/include/cudnn_frontend.h $(HOME)/.local/lib/python3*/site-packages/include/cudnn_frontend.h \
	.venv/lib/python3*/site-packages/include/cudnn_frontend.h $(VIRTUAL_ENV)/lib/python3*/site-packages/include/cudnn_frontend.h)))
CUDNN_FLAGS = -DGA_CUDNN -isystem $(or $(CUDNN_FRONTEND),$(error CUDNN=1: cudnn_frontend.h is not found; pip install nvidia-cudnn-frontend, or CUDNN_FRONTEND=DIRECTORY)) -lcudnn -lnvrtc
# Where the driver does not work, nvidia-smi says so on its standard output.
CUDA_GPU := $(if $(NVCC),$(shell nvidia-smi -L 2>/dev/null | sed -n 's/^GPU [0-9]*: \(.*\) .UUID.*/\1/p' | sort -u))
CUDA_ARCH ?= $(if $(CUDA_GPU),-arch=native,-gencode arch=compute_75$(comma)code=compute_75 -gencode arch=compute_80$(comma)code=[sm_80$(comma)compute_80])
$(BUILD)/cuda/declarations: gated_attention.h
	@mkdir -p $(BUILD)/cuda
	@sed '/^.* ==== implementation/,$$d' $< | cmp -s - $@ || sed '/^.* ==== implementation/,$$d' $< >$@
.PHONY: FORCE
FORCE:
$(BUILD)/cuda/options: FORCE
	@mkdir -p $(BUILD)/cuda
	@echo 'CUDNN=$(CUDNN) $(CUDA_ARCH) $(CUDA_GPU)' | cmp -s - $@ || echo 'CUDNN=$(CUDNN) $(CUDA_ARCH) $(CUDA_GPU)' >$@
$(BUILD)/cuda/libgated_attention_cuda.so: gated_attention_cuda.cuh $(BUILD)/cuda/declarations $(BUILD)/cuda/options
	$(NVCC) -std=c++17 -O3 -lineinfo $(CUDA_ARCH) -shared -Xcompiler -Wall,-Wextra,-fPIC -DGATED_ATTENTION_CUDA_IMPLEMENTATION $(CUDA_NCCL) -x cu $< -o $@ \
		-Xlinker -soname=$(@F) -L$(CUDA_LIB) -Xlinker -rpath=$(CUDA_LIB) -lcublasLt $(if $(filter-out 0,$(CUDNN)),$(CUDNN_FLAGS)) || \
		{ echo 'nvcc fails: NVCC= builds for the CPU alone; NVCC_PREPEND_FLAGS=-ccbin=g++-12 takes an older host compiler' >&2; exit 1; }

# ---- the main job, small: both quick models, then the report -------------------------------------------------------
DEMO ?= demo
DEMO_ARGS ?=
demo: train analyze
	@sh tests/demo.sh $(DEMO) $(DEMO_ARGS)
pairs: train analyze
	@tests/experiments/pairs.sh
table4: train analyze
	@tests/experiments/table4.sh
sweep: train
	@tests/experiments/sweep.sh
late-gate: train
	@tests/experiments/late_gate.sh
lengths: train analyze
	@tests/experiments/lengths.sh
curves: train
	@tests/experiments/curves.sh $(CURVES)

# ---- tests ---------------------------------------------------------------------------------------------------------
C_TESTS = gradients operators fixtures model checkpoint data tokenizer x86 amx analysis ranks plan results
SH_TESTS = header ports train mpi analyze text hostile evaluate readme isa cuda round_trip fuzz report
TEST_CFLAGS = -std=c11 $(WARN) $(CFLAGS) $(OPENMP) $(TEXT) -I. -Itests
TEST_HEADERS = $(HEADERS) $(wildcard tests/*.h) train.c analyze.c

$(BUILD)/test_%: tests/test_%.c $(TEST_HEADERS) | packages-test
	@mkdir -p $(BUILD)
	$(CC) $(TEST_CFLAGS) $< -o $@ -lcmocka -lpthread $(LDLIBS)

# A make of its own builds on all cores, and sees what the packages have brought.
programs-test: train analyze data/vocabulary $(C_TESTS:%=$(BUILD)/test_%)
test: packages-test
	@$(MAKE) --no-print-directory -j$$(getconf _NPROCESSORS_ONLN) programs-test
	@sh tests/run.sh tests/sanitize.sh tests/mutants.sh $(SH_TESTS:%=tests/test_%.sh) $(C_TESTS:%=$(BUILD)/test_%)

# The kernels for NVIDIA GPUs as plain C++ on the CPU: needs the CUDA headers, but neither nvcc nor a GPU.
CUDA_INCLUDE := $(if $(CUDA_HOME),$(if $(wildcard $(CUDA_HOME)/include/cublasLt.h),$(CUDA_HOME)/include),$(patsubst %/cublasLt.h,%,$(wildcard /usr/include/cublasLt.h)))
CUDA_CPU = -std=c++17 -g $(WARN) -Wno-pedantic -Wno-unknown-pragmas -DGAI_CUDA_CPU $(CUDA_NCCL) -I. -Itests/cuda -isystem $(CUDA_INCLUDE)
CUDA_CPU_PARTS = cuda_cpu cuda_cpu_runtime cuda_cpu_libs $(if $(CUDA_NCCL),cuda_cpu_nccl)
print-%:
	@echo '$($*)'
$(BUILD)/cuda/%.o: tests/cuda/%.cpp $(wildcard tests/cuda/*.h)
	@mkdir -p $(BUILD)/cuda
	$(CXX) $(CUDA_CPU) -O2 -c $< -o $@
$(BUILD)/cuda/kernels_cpu.o: gated_attention_cuda.cuh gated_attention.h $(wildcard tests/cuda/*.h)
	@mkdir -p $(BUILD)/cuda
	$(CXX) $(CUDA_CPU) -O1 --coverage -DGATED_ATTENTION_CUDA_IMPLEMENTATION -x c++ -c $< -o $@
$(BUILD)/cuda/test_%.o: tests/cuda/test_%.c tests/cuda/cuda_cpu_control.h tests/cuda/device.h $(TEST_HEADERS) | packages-test
	@mkdir -p $(BUILD)/cuda
	$(CC) $(TEST_CFLAGS) -DGAI_CUDA_CPU -Itests/cuda -c $< -o $@
$(BUILD)/cuda/%_cpu: $(BUILD)/cuda/test_%.o $(BUILD)/cuda/kernels_cpu.o $(CUDA_CPU_PARTS:%=$(BUILD)/cuda/%.o)
	$(CXX) --coverage -rdynamic $^ -o $@ $(OPENMP) -lcmocka $(LDLIBS)
# The same with the attention of tests/cuda/cudnn/cudnn_frontend.h in the place of cuDNN.
$(BUILD)/cuda/cudnn/kernels.o: gated_attention_cuda.cuh gated_attention.h $(wildcard tests/cuda/*.h tests/cuda/cudnn/*.h)
	@mkdir -p $(@D)
	$(CXX) $(CUDA_CPU) -Itests/cuda/cudnn -O1 -DGA_CUDNN -DGATED_ATTENTION_CUDA_IMPLEMENTATION -x c++ -c $< -o $@
$(BUILD)/cuda/cudnn/test_sdpa.o: tests/cuda/test_sdpa.c tests/cuda/cuda_cpu_control.h tests/cuda/device.h $(TEST_HEADERS) | packages-test
	@mkdir -p $(@D)
	$(CC) $(TEST_CFLAGS) -DGAI_CUDA_CPU -DGA_CUDNN -Itests/cuda -c $< -o $@
$(BUILD)/cuda/cudnn/sdpa_cpu: $(BUILD)/cuda/cudnn/test_sdpa.o $(BUILD)/cuda/cudnn/kernels.o $(CUDA_CPU_PARTS:%=$(BUILD)/cuda/%.o)
	$(CXX) -rdynamic $^ -o $@ $(OPENMP) -lcmocka $(LDLIBS)
# The same with the checker of tests/cuda/cuda_cpu_check.cpp: the compiler's calls for the thread sanitizer go to it.
# -fno-tree-sra: an access of 16 bytes stays one.
CUDA_CHECKED = $(CUDA_CPU) -DCUCPU_CHECK -fno-pie -fno-tree-sra -Wno-ignored-optimization-argument
CUDA_CHECKED_PARTS = $(CUDA_CPU_PARTS:%=$(BUILD)/cuda/checked/%.o) $(BUILD)/cuda/checked/cuda_cpu_check.o \
                     $(BUILD)/cuda/checked/cuda_cpu_count.o
$(BUILD)/cuda/checked/%.o: tests/cuda/%.cpp $(wildcard tests/cuda/*.h)
	@mkdir -p $(BUILD)/cuda/checked
	$(CXX) $(CUDA_CHECKED) -O2 -c $< -o $@
$(BUILD)/cuda/checked/kernels.o: gated_attention_cuda.cuh gated_attention.h $(wildcard tests/cuda/*.h)
	@mkdir -p $(BUILD)/cuda/checked
	$(CXX) $(CUDA_CHECKED) -O1 -fsanitize=thread -DGATED_ATTENTION_CUDA_IMPLEMENTATION -x c++ -c $< -o $@
$(BUILD)/cuda/checked/%_cpu: $(BUILD)/cuda/test_%.o $(BUILD)/cuda/checked/kernels.o $(CUDA_CHECKED_PARTS)
	$(CXX) -no-pie -rdynamic -Wl,--wrap=memcpy,--wrap=memset $^ -o $@ $(OPENMP) -lcmocka $(LDLIBS)
# The programs themselves with the emulated GPU, for tests/cuda/resume.sh and analysis.sh.
$(BUILD)/cuda/train_cpu $(BUILD)/cuda/analyze_cpu: $(BUILD)/cuda/%_cpu: %.c $(HEADERS) $(BUILD)/cuda/kernels_cpu.o $(CUDA_CPU_PARTS:%=$(BUILD)/cuda/%.o) | packages
	$(CC) $(ALL_CFLAGS) -O1 -DGA_CUDA -c $< -o $(BUILD)/cuda/$*.o
	$(CXX) --coverage -rdynamic $(BUILD)/cuda/$*.o $(filter %.o,$^) -o $@ $(OPENMP) $(LDLIBS)

# On a machine with a GPU: the same tests for real, then speed and memory beside PyTorch.
$(BUILD)/cuda/%_gpu: tests/cuda/test_%.c tests/cuda/device.h $(CUDA_LIBRARY) $(TEST_HEADERS) | packages-test
	$(CC) $(TEST_CFLAGS) $< $(CUDA_LIBRARY) -o $@ -Wl,-rpath,'$$ORIGIN' -lcmocka $(LDLIBS)
test-cuda: train analyze $(if $(NVCC),$(BUILD)/cuda/cuda_gpu $(BUILD)/cuda/sdpa_gpu)
	@sh tests/cuda/gpu.sh
BENCH_CUDA ?=
bench-cuda: train
	@sh tests/cuda/bench.sh $(BENCH_CUDA)

sanitize: packages-test
	@sh tests/sanitize.sh
mutants: packages-test
	@sh tests/mutants.sh && sh tests/cuda/bugs.sh
FUZZ_SECONDS ?= 600
fuzz: packages-test
	@tests/fuzz/fuzz.sh $(FUZZ_SECONDS)
reference:
	@tests/reference/setup.sh && .venv/bin/python tests/reference/make_fixtures.py
$(BUILD)/bench/mkl.so: tests/bench/mkl.c
	@mkdir -p $(BUILD)/bench
	$(CC) -std=c11 $(WARN) -shared -fPIC $< -o $@
$(BUILD)/bench/%: tests/bench/%.c $(HEADERS)
	@mkdir -p $(BUILD)/bench
	$(CC) $(TEST_CFLAGS) $< -o $@ $(LDLIBS)
BENCH ?=
bench: train
	@sh tests/bench/bench.sh $(BENCH)

# ---- formatting and static analysis --------------------------------------------------------------------------------
SOURCES = $(wildcard $(foreach directory,. data drivers drivers/train drivers/analyze tests tests/bench tests/cuda \
	tests/fuzz tests/reference,$(addprefix $(directory)/*.,c h cpp cuh)))
format:
	clang-format -i $(SOURCES)
check: packages-test
	@sh tests/check.sh $(SOURCES)

clean:
	rm -rf train analyze data/vocabulary $(BUILD) $(DEMO)
