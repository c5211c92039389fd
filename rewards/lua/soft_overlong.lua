-- DAPO's soft overlong punishment: 0 up to max_len - cache tokens, then down to -1 at max_len and beyond.
-- Options: max_len (1024), cache (256). Abstains where the number of tokens is unknown.
function reward(sample, ctx)
  local length = sample.length or (sample.tokens and #sample.tokens)
  if length == nil then return nil end
  local max_len = ctx.options.max_len or 1024
  return rft.shape.soft_overlong(length, max_len, ctx.options.cache or math.min(256, max_len))
end
