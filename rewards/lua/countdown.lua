-- Countdown and the 24 game: 1 where the expression uses every number of `numbers` exactly once and gives `target` (24 where the
-- row has none), else 0; abstains without numbers. The expression is in <answer> tags, or what follows </think>;
-- a trailing "= target" is dropped. Option peer = true scores as reasoning-gym does (0.05 and 0.01 for near misses, bare text only).
function reward(sample, ctx)
  if sample.numbers == nil then return nil end
  local target = sample.target or 24
  if ctx.options.peer then return rft.math.countdown(sample.completion, sample.numbers, target) end
  local text = rft.text.tag(sample.completion, "answer") or rft.text.after_think(sample.completion)
  text = rft.regex.replace(text, "=\\s*-?[0-9.]+\\s*$", "")
  text = rft.regex.replace(rft.regex.replace(text, "×|·", "*"), "÷", "/")
  if not rft.regex.test(text, "^[0-9+*/() \\t\\n-]+$") then return 0 end
  return rft.math.countdown(rft.text.trim(text), sample.numbers, target) == 1 and 1 or 0
end
