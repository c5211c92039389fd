-- Punishes repeated n-grams: max_penalty * (1 - distinct / all), from 0 (none repeats) to max_penalty.
-- Options: n (3), max_penalty (-1). Over token ids as TRL has it; over words where the tokens are unknown.
function reward(sample, ctx)
  local n, penalty = ctx.options.n or 3, ctx.options.max_penalty or -1
  if sample.tokens then return rft.shape.repetition(sample.tokens, n, penalty) end
  return rft.text.repetition(sample.completion, n) * penalty
end
