"""Speed and memory beside other libraries, in the same run: the record of what made our side fast.

Levers, and what each gave on 2 cores of an AMD EPYC (float32; the machine's own speed drifts by 15 % between runs; on a
faster EPYC with AVX-512 the same code has since trained 2.7 times as fast, torch's 1.6 times):

- `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`: 1.34 to 1.07 s a step of a 2.6 M-parameter GPT (page faults 218,000 to 800).
- `unstack` by `lax.split` instead of `x[i]`: its gradient is one concatenation; with it and the next two, 9.2 to 8.3 s
  a step of GPT-2 small.
- weight gradients as plain matrices (leading axes flattened), kept out: 4 % faster when XLA gives only products to YNN
  (`--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT`), 30 % slower without that flag.
- the gradient of the logits behind an `optimization_barrier`, so that the two products which read it share one copy,
  and cross-entropy in 4 chunks whose gradient is taken beside their logits: 7.6 to 6.5 s a step of GPT-2 small.
- `--xla_cpu_enable_concurrency_optimized_scheduler=false`: speed as before, within noise; temporary memory of that
  step 2.75 to 1.58 GB.
- `--xla_cpu_copy_insertion_use_region_analysis=true`: 1.49 to 1.19 GB of that step scanned, by not copying Adam's
  moments; speed as before, within noise.
- norms, activations and attention that keep only their inputs for the backward pass: scanned, 2.32 to 1.49 GB and
  121 to 145 tokens/s; unrolled, 1.58 to 1.49 GB and 139 to 138.
- the activation computed again for the down kernel's gradient: scanned, 1.19 to 1.06 GB of that step, unrolled 1.50 to
  1.37; 1 % slower, within noise.
- decoding with kernels stored as their transpose (`weights.Transposed`), so that XLA:CPU packs the few rows of the
  activations and not the whole matrix: 61 to 43 ms a token of batch 8; the same for the tied head is included.
- keys and values stored `[B, K, S, H]`, as the products of attention read them: 43 to 33 ms a token of batch 8.
- beam search of T5 small, 8 x 4 beams, on AVX-512 cores: 173 tokens/s with the cache copied in a new order for
  every token; 161 with a table of ancestors (XLA:CPU multiplies 4 queries with many keys slowly); 221 with no more
  slots than the output needs; 324 with queries taken one by one, and 239 of these with `FEW_ROWS` at 16 instead of 64
  (the output layer has 32 rows). The best entries by blocks: 1.5 to 0.3 ms for 32 rows of 32,128.
- the few queries of a row's beams, or of a group of heads, as the second operand of both products of attention
  (`attend._Few`), instead of one by one: 27.5 to 25.6 ms a token of 8 x 4 beams of T5 small, 38.6 to 35.1 of
  Marian; SmolLM2-135M, batch 8 behind 256 tokens, 58 to 80 tokens/s.
- beams that take the logits by columns, as the last product leaves them, and no copy to ban an entry: 25.6 to 24.1 and
  35.1 to 32.0 ms. What is left is 60 % products with weights at two thirds of the rate of large ones.
- these columns padded to whole blocks, so that the best entries read them without a copy: 0.7 ms of 30 (Marian).
- glibc's `mmap_max=0` with a large `trim_threshold`: no page faults, but 7.7 instead of 5.1 GB; kept out.
- the label's logit by a gather instead of a comparison: nothing beyond noise.
- LoRA's scale between A and B and not behind B, where it costs a pass over outputs and one over their gradients: 162 to
  142 MB that the compiled step of a toy of 3 layers accesses, 13.5 to 12.6 of them temporary.
- DoRA's product kept where the down kernel's activation is computed again, since the magnitude's gradient reads it: the
  compiled FLOPs of the same toy's step from 1.11 to 1.02 of LoRA's. Decoding computes its factors once, outside of the
  loop; XLA takes them out.
- attention in `chunked` form against `fused`: 4 % on the demo's model, within noise.

On 2 cores of an Intel Xeon (AVX-512), alone on the machine, medians of 3 turns: encoding 0.88 of torch eager (0.97 of
onnxruntime), a step of XLNet 1.01, of ALBERT 0.95; T5 greedy 1.46 and beam 4 1.48 of transformers (1.7 and 1.2 of
ctranslate2), opus-mt 1.34 and 1.46 (1.8 and 1.2). Products of few rows with weights are level with torch's there and
read 17 to 21 GB/s, which is nearly all of a token's time; kernels transposed or not, small ones or all: no difference.

On an NVIDIA H100 (bfloat16, 32 rows of 1,024 tokens, jax 0.11.2):

- cuDNN's attention kernel (XLA's own materialises all scores), with the backward pass keeping inputs only: scanned, 126
  to 103 ms a step and 30.7 to 14.2 GB.
- a vocabulary padded to a multiple of 128, without which cuBLAS is not used for the rows of 50,257 (24 of 86 ms), and
  logits kept in bfloat16 under the float32 loss: unrolled, 89 to 73 ms, 17.0 to 13.6 GB.
- command buffers for decoding: 1,453 tokens/s as XLA has them by default, 1,433 around the whole loop, 477 without.
- a model of 1.2 billion parameters under plans for one device: `experiments/benchmark/cases/plans.py`.
"""
