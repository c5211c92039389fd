-- may end in: runtime timeout instructions
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return string.find(string.rep("a", 300000), string.rep("(", 100) .. "a") end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
