-- may end in: timeout instructions runtime ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return string.find(string.rep("a", 5000), string.rep("a?", 5000) .. string.rep("a", 5000)) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
