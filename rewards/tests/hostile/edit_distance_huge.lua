-- may end in: runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return rft.text.edit_distance(string.rep("a", 1e6), string.rep("b", 1e6)) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
