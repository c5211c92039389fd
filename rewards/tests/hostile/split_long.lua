-- may end in: runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return #string.split(string.rep("a", 1e6), string.rep("a", 5e5) .. "b") end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
