"""An optimized program in the words of a TPU's compiler."""

import re

# a loop of four turns without annotation; a gather in three links behind two products; a permutation behind one
TPU = """HloModule jit_step, is_scheduled=true

%start (p.0: bf16[8,16]) -> (bf16[8,16], bf16[8,64]) {
  %p.0 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g.0 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p.0), LINK, metadata={op_name="jit(step)/up"}
  ROOT %c.0 = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) custom-call(%g.0), custom_call_target="x"
}

%middle (p.1: bf16[8,16]) -> bf16[8,64] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %g.1 = bf16[8,64]{1,0} all-gather(%p.1), LINK
}

%done (p.2: bf16[8,16]) -> bf16[8,64] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %g.2 = bf16[8,64]{1,0} all-gather(%p.2), LINK
}

%condition (t.0: (u32[], bf16[8,16])) -> pred[] {
  %four = u32[]{:T(128)} constant(4)
  %t.0 = (u32[]{:T(128)}, /*index=1*/bf16[8,16]{1,0}) parameter(0)
  %n = u32[] get-tuple-element(%t.0), index=0
  ROOT %less = pred[] compare(%n, %four), direction=LT
}

%body (t.1: (u32[], bf16[8,16])) -> (u32[], bf16[8,16]) {
  %t.1 = (u32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%t.1), index=1
  %begin = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) fusion(%x), kind=kCustom, calls=%start, cost=5
  %go = bf16[8,64]{1,0} fusion(%x), kind=kOutput, calls=%middle, cost=100
  %product = bf16[8,64]{1,0} convolution(%x, %x), cost=30
  %end = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%done, cost=5
  %send = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9, PAIRS
  %more = bf16[8,64]{1,0} fusion(%x), kind=kLoop, calls=%other, cost=11
  %sent = bf16[8,16]{1,0} collective-permute-done(%send)
  %m = u32[] get-tuple-element(%t.1), index=0
  ROOT %out = (u32[], bf16[8,16]{1,0}) tuple(%m, %sent)
}

%other (p.3: bf16[8,16]) -> bf16[8,64] {
  %p.3 = bf16[8,16]{1,0} parameter(0)
  ROOT %b = bf16[8,64]{1,0} broadcast(%p.3), dimensions={0}, cost=1000
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %pair = (u32[], bf16[8,16]{1,0}) tuple(%zero, %p)
  %loop = (u32[], bf16[8,16]{1,0}) while(%pair), condition=%condition, body=%body
  ROOT %r = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
LINK = "channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}, frontend_attributes={chain_id=\"1\"}"
TPU = TPU.replace("LINK", LINK).replace("PAIRS", "source_target_pairs={{0,1},{1,2},{2,0}}")
TPU = re.sub(r"cost=(\d+)", r'backend_config={"estimated_cycles":"\1"}', TPU)
