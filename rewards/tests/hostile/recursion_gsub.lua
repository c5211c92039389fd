-- may end in: runtime memory ok timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local function f(x) return string.gsub(x, ".", f) end f("a") return 1 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
