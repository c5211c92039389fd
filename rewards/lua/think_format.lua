-- TRL's think format: 1 where the completion opens with <think>, holds it once and closes it, else 0.
-- Our own stricter version is `format`.
function reward(sample, ctx)
  return rft.shape.think_format(sample.completion)
end
