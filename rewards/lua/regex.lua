-- 1 where the completion matches the regular expression `pattern` of the row (or of the options), else 0; abstains without one.
-- Options: pattern, whole (false; the whole completion must match), after_think (false; look only behind </think>).
-- The syntax is that of the Rust crate `regex`: linear time, no look-around, no back-references.
function reward(sample, ctx)
  local pattern = sample.pattern or ctx.options.pattern
  if pattern == nil then return nil end
  local text = sample.completion
  if ctx.options.after_think then text = rft.text.after_think(text) end
  if ctx.options.whole then pattern = "^(?:" .. pattern .. ")$" end
  return rft.regex.test(text, pattern) and 1 or 0
end
