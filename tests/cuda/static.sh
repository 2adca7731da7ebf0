#!/bin/sh
# What can be known of gated_attention_cuda.cuh without a GPU: it compiles for every architecture with warnings and register
# spills as errors, and its machine code has what it was written for; cuDNN's frontend finds its graphs valid. Needs nvcc; the machine code also needs cuobjdump and
# nvdisasm (of the toolkit, or PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm in .venv).
#     tests/cuda/static.sh [ARCHITECTURE...]    75 80 86 89 90 100 120
set -u
cd "$(dirname "$0")/../.." || exit 1
. tests/testing.sh
nvcc=$(make -s print-NVCC) nccl=$(make -s print-CUDA_NCCL)
if [ -z "$nvcc" ]; then
    skip "the machine code (nvcc is not here)"
    finish
fi
PATH=$PATH:$(dirname "$(realpath "$nvcc")") # with cuobjdump and nvdisasm
for tools in .venv/lib/python3*/site-packages/nvidia/*/bin; do
    [ -x "$tools/cuobjdump" ] && PATH=$(realpath "$tools"):$PATH
done

compile() {
    "$nvcc" -std=c++17 -O3 -gencode "arch=compute_$1,code=sm_$1" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror \
        -Xptxas --warn-on-spills -DGATED_ATTENTION_CUDA_IMPLEMENTATION $nccl -x cu -cubin gated_attention_cuda.cuh \
        -o "$work/$1.cubin" > "$work/$1.log" 2>&1
}

# Kernels of a name, and how an instruction that each of them must have begins. No kernel may touch local memory: STL and LDL are spills.
expected() {
    cat << 'LIST'
gai_k_flash_forward HMMA[.]16816[.]F32[.]BF16
gai_k_flash_forward LDSM[.]16[.]M88[.]4
gai_k_flash_forward LDSM[.]16[.]MT88[.]4
gai_k_flash_forward LDGSTS[.]E[.]BYPASS([.]LTC128B)?[.]128
gai_k_flash_backward HMMA[.]16816[.]F32[.]BF16
gai_k_flash_backward LDSM[.]16[.]M88[.]4
gai_k_flash_backward LDSM[.]16[.]MT88[.]4
gai_k_flash_backward LDGSTS[.]E[.]BYPASS([.]LTC128B)?[.]128
gai_k_flash_round LDG[.]E[.]128
gai_k_plain_ LDS([.]U)?[.]128
gai_k_rmsnorm_forwardILi4E LDG[.]E[.]128
gai_k_swiglu_forwardILi4E LDG[.]E[.]128
gai_k_adamwILi4E LDG[.]E[.]128
LIST
    [ -z "$nccl" ] || printf '%s LDG[.]E[.]128\n' gai_k_pack_parts gai_k_add_parts_bf16
}

# examine ARCHITECTURE: prints what is missing, and what should not be there
examine() {
    cuobjdump -sass "$work/$1.cubin" > "$work/$1.sass" || return 1
    expected > "$work/expected"
    awk -v arch="$1" 'FNR == NR { kernel[++n] = $1; instruction[n] = $2; next }
        /Function :/ { name = $3; functions[name] }
        { if (match($0, /[A-Z][A-Z0-9]*(\.[A-Z0-9_]+)*/) && index($0, "/*") == 9) {
              text = substr($0, index($0, "*/") + 2); sub(/^ *(@!?U?P[0-9T]+ )? */, "", text); sub(/[ ;].*/, "", text)
              has[name, text]
              if (text ~ /^(STL|LDL)/) spills[name] } }
        END {
            for (name in spills) print "local memory in " name
            for (i = 1; i <= n; i++) {
                if (arch < 80 && kernel[i] ~ /^gai_k_flash_[bf]/) continue
                seen = 0
                for (name in functions) if (index(name, kernel[i])) {
                    seen = 1
                    if (!has_like(name, instruction[i])) print instruction[i] " is missing in " name
                }
                if (!seen) print "no kernel " kernel[i]
            } }
        function has_like(name, what, key, parts) {
            for (key in has) { split(key, parts, SUBSEP); if (parts[1] == name && parts[2] ~ "^" what) return 1 }
            return 0 }' "$work/expected" "$work/$1.sass"
}

command -v cuobjdump > "$work/where" && command -v nvdisasm >> "$work/where" && has_tools=1 || has_tools=0
[ "$has_tools" = 1 ] || skip "the machine code (cuobjdump and nvdisasm are not here)"
[ $# -gt 0 ] || set -- 75 80 86 89 90 100 120
for arch; do compile "$arch" & done
wait
for arch; do
    if [ -f "$work/$arch.cubin" ]; then
        ok "sm_$arch compiles, no warnings, no spills"
    else
        bad "sm_$arch" "$(grep -E 'error|warning' "$work/$arch.log" | head -n 5)"
        continue
    fi
    [ "$has_tools" = 1 ] || continue
    missing=$(examine "$arch") || missing="cuobjdump failed"
    if [ -z "$missing" ]; then ok "sm_$arch machine code"; else bad "sm_$arch machine code: $missing"; fi
done

# What the companion looks up in NCCL's library is there.
library=$(make -s print-CUDA_LIB)/libnccl.so.2
if [ -z "$nccl" ] || [ ! -f "$library" ]; then
    skip "NCCL's functions (nccl.h or libnccl.so.2 is not here)"
else
    nm -D --defined-only "$library" | awk '{ print $3 }' > "$work/there"
    sed -n '/define GAI_NCCL_FUNCTIONS/,/[^\\]$/p' gated_attention_cuda.cuh | grep -o 'X([A-Z][A-Za-z]*)' |
        sed 's/X(/nccl/; s/)//' > "$work/wanted"
    missing=$(grep -vxF -f "$work/there" "$work/wanted")
    if [ -s "$work/wanted" ] && [ -z "$missing" ]; then
        ok "libnccl.so.2 has all $(grep -c . "$work/wanted") functions"
    else
        bad "libnccl.so.2 lacks $missing"
    fi
fi

# Compiled, linked, and validated with the real frontend; the kernels are compiled for no GPU at all.
validate() {
    ${CC:-cc} -std=c11 -DGATED_ATTENTION_IMPLEMENTATION -x c -c gated_attention.h -o "$work/header.o" &&
        "$nvcc" -std=c++17 -gencode arch=compute_80,code=compute_80 -Xcicc -O0 -Werror all-warnings \
            -Xcompiler -Wall,-Wextra,-Werror -DGA_CUDNN -isystem "$frontend" -I. tests/cuda/cudnn_graphs.cu \
            "$work/header.o" -o "$work/graphs" -L"$library" -Xlinker -rpath="$library" -lcublasLt -lcudnn -lnvrtc &&
        "$work/graphs"
}
frontend=$(make -s print-CUDNN_FRONTEND) library=$(make -s print-CUDA_LIB)
if [ -n "$frontend" ] && [ -f "$library/libcudnn.so" ]; then
    check "cuDNN compiles, links, and finds its graphs valid" validate
else
    skip "cuDNN (libcudnn or its frontend is not here: pip install nvidia-cudnn-frontend)"
fi
finish
