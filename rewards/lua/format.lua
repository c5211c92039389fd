-- 1 where the whole completion is <think>…</think> and then <answer>…</answer>, each tag once and neither part empty.
local TAGS = { "<think>", "</think>", "<answer>", "</answer>" }

function reward(sample, ctx)
  local text = sample.completion
  for _, tag in TAGS do
    local first, last = string.find(text, tag, 1, true)
    if first == nil or string.find(text, tag, last + 1, true) then return 0 end
  end
  local thought, answer = string.match(text, "^%s*<think>(.*)</think>%s*<answer>(.*)</answer>%s*$")
  if thought == nil or not string.find(thought, "%S") or not string.find(answer, "%S") then return 0 end
  return 1
end
