-- may end in: memory runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local x = string.rep("x", 1e6) return string.gsub(x, "x", x) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
